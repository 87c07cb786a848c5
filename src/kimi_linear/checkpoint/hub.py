"""From what a user names to a directory: a path, or a hub name whose snapshot already lies in the local cache."""

import os
import re
from pathlib import Path

from kimi_linear.base.errors import CheckpointError, plain

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"


def resolve(path_or_name: str | os.PathLike[str]) -> Path:
    """Return the directory of a checkpoint, or a GGUF file as it is. Never uses the network.

    Args:
        path_or_name: A directory, a GGUF file, or a name such as "moonshotai/Kimi-Linear-48B-A3B-Instruct" whose files
            `hf download` has put into the cache (HF_HUB_CACHE, else HF_HOME/hub, else ~/.cache/huggingface/hub).

    Raises:
        CheckpointError: Neither a directory nor in the cache.
    """
    name = str(path_or_name)
    if not name:
        # As a path, it would be the current directory.
        raise CheckpointError("the path of the checkpoint is empty; give the directory of a saved model.")
    try:
        path = Path(path_or_name).expanduser()
        if path.is_dir() or is_gguf(path):
            return path
        if path.exists():
            raise CheckpointError(
                f"{plain(str(path))} is a file, expected the directory of a saved model, or a .gguf file."
            )
    except (OSError, RuntimeError) as error:
        # Too long, not permitted, or in the home of nobody.
        reason = error.strerror if isinstance(error, OSError) else str(error).rstrip(".")
        raise CheckpointError(
            f"{plain(name)} cannot be opened: {reason}; give the directory of a saved model."
        ) from error
    if not re.fullmatch(rf"{_PART}/{_PART}", name):
        raise CheckpointError(f"{plain(name)} does not exist; give the directory of a saved model.")
    snapshot = _snapshot(cache_directory() / f"models--{name.replace('/', '--')}")
    if snapshot is None:
        raise CheckpointError(
            f"{name} is neither a directory nor in the cache {cache_directory()}; "
            f"download it first (hf download {name}), or give a directory."
        )
    return snapshot


def is_gguf(path: Path) -> bool:
    """Return whether a path is a file with the suffix .gguf."""
    return path.suffix == ".gguf" and path.is_file()


def cache_directory() -> Path:
    """Return where downloaded hub files lie, by the hub client's own variables."""
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()


def _snapshot(repository: Path) -> Path | None:
    reference = repository / "refs" / "main"
    if not reference.is_file():
        return None
    revision = reference.read_text(encoding="utf-8", errors="replace").strip()
    snapshot = repository / "snapshots" / revision
    return snapshot if re.fullmatch(_PART, revision) and snapshot.is_dir() else None
