"""The environment of the packages we measure beside, apart from our own so that neither changes the other.

Run it to create `.venv-peers`, or to see that it stands: python benchmarks/peers.py
"""

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = Path(__file__).with_name("peers-requirements.txt")
ENVIRONMENT = ROOT / ".venv-peers"


@dataclass(frozen=True)
class Peers:
    """The interpreter that has the peers, or the sentence that says why there is none."""

    python: Path | None
    reason: str = ""


def _fingerprint() -> str:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return hashlib.sha256(f"{version}\n{REQUIREMENTS.read_text(encoding='utf-8')}".encode()).hexdigest()


def _run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)


def _install(environment: Path, python: Path) -> None:
    _run(sys.executable, "-m", "venv", "--clear", environment)
    _run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement", REQUIREMENTS)


def ensure(environment: Path = ENVIRONMENT) -> Peers:
    """Create the environment unless it stands as pinned. A missing peer is a row that says so, not an error."""
    python, stamp = environment / "bin" / "python", environment / ".installed"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == _fingerprint() and python.exists():
        return Peers(python)
    try:
        _install(environment, python)
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        # pip ends with notices; what stopped it stands before them.
        said = [line for line in lines if line.startswith("ERROR")] or lines
        return Peers(None, f"{REQUIREMENTS.name} cannot be installed: {said[-1]}")
    stamp.write_text(_fingerprint(), encoding="utf-8")
    return Peers(python)


if __name__ == "__main__":
    peers = ensure()
    print(f"peers: {peers.reason or peers.python}")
