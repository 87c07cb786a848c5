"""The environment of the packages we measure beside, apart from our own so that neither changes the other.

Run it to create `.venv-peers`, or to see that it stands: python benchmarks/peers.py
"""

import hashlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = Path(__file__).with_name("peers-requirements.txt")
# Built from source, so that it has the instructions of this processor; without a compiler there is no such row.
NATIVE_REQUIREMENTS = Path(__file__).with_name("peers-native-requirements.txt")
ENVIRONMENT = ROOT / ".venv-peers"


@dataclass(frozen=True)
class Peers:
    """The interpreter that has the peers, or the sentence that says why there is none."""

    python: Path | None
    reason: str = ""
    # Why llama.cpp could not be built for this processor, or "".
    native_reason: str = ""


def _fingerprint(requirements: Path) -> str:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return hashlib.sha256(f"{version}\n{requirements.read_text(encoding='utf-8')}".encode()).hexdigest()


def _run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)


def _install(environment: Path, python: Path) -> None:
    _run(sys.executable, "-m", "venv", "--clear", environment)
    _run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement", REQUIREMENTS)


def _build_native(_environment: Path, python: Path) -> None:
    _run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement", NATIVE_REQUIREMENTS)


def _attempt(step: Callable[[Path, Path], None], requirements: Path, environment: Path, stamp: Path) -> str:
    """Take a step of the installation unless it was taken with these pins; return what stopped it, or ""."""
    python = environment / "bin" / "python"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == _fingerprint(requirements) and python.exists():
        return ""
    try:
        step(environment, python)
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        # pip ends with notices; what stopped it stands before them.
        said = [line for line in lines if line.startswith("ERROR")] or lines
        return f"{requirements.name} cannot be installed: {said[-1]}"
    stamp.write_text(_fingerprint(requirements), encoding="utf-8")
    return ""


def ensure(environment: Path = ENVIRONMENT) -> Peers:
    """Create the environment unless it stands as pinned. A missing peer is a row that says so, not an error."""
    reason = _attempt(_install, REQUIREMENTS, environment, environment / ".installed")
    if reason:
        return Peers(None, reason, reason)
    native = _attempt(_build_native, NATIVE_REQUIREMENTS, environment, environment / ".installed-native")
    return Peers(environment / "bin" / "python", native_reason=native)


if __name__ == "__main__":
    peers = ensure()
    print(f"peers: {peers.reason or peers.python}; llama.cpp for this processor: {peers.native_reason or 'built'}")
