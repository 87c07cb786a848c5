"""Tensors in: which files hold a checkpoint, what each says it holds, and the tensors as views of the mapped file.

Nothing is trusted: file names in an index must be plain, headers are validated before a byte of a tensor is read,
and pickle files are never opened.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kimi_linear.base.config import read_json
from kimi_linear.base.errors import CheckpointError, ConfigError
from kimi_linear.checkpoint.writer import INDEX_NAME, SINGLE_NAME

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class StoredTensor:
    """What a file's header says of one tensor. `dtype` is the format's own name, "BF16" for instance."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def stored_tensors(
    directory: Path, header_of: Callable[[Path], dict[str, StoredTensor]] | None = None
) -> dict[str, StoredTensor]:
    """Return every tensor of a checkpoint by name, from the headers alone.

    Args:
        directory: Of the checkpoint.
        header_of: Reads one file's header; default: through the safetensors library, which maps the whole file.

    Raises:
        CheckpointError: No safetensors file, a missing or damaged one, or an index that does not match the files.
    """
    header_of = header_of or read_header
    single, index = directory / SINGLE_NAME, directory / INDEX_NAME
    if single.is_file():
        return header_of(single)
    if not index.is_file():
        raise CheckpointError(_no_weights(directory))
    weight_map = _read_index(index)
    found: dict[str, StoredTensor] = {}
    for file_name in sorted(set(weight_map.values())):
        expected = {name for name, file in weight_map.items() if file == file_name}
        found |= _check_shard(directory / file_name, header_of(directory / file_name), expected)
    return found


@contextmanager
def open_shard(path: Path) -> Iterator[Any]:
    """Open one safetensors file; `get_tensor(name)` returns a view of the mapped file, valid after closing too.

    Raises:
        CheckpointError: The file is missing, cut off, or its header is not valid.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist, though the checkpoint's index names it; download it.") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); download or save it again."
        ) from error


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return every tensor of one safetensors file by name.

    Raises:
        CheckpointError: The file is missing, cut off, or its header is not valid.
    """
    with open_shard(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - a file is not a dict
        return {name: StoredTensor(path, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}


def _check_shard(path: Path, found: dict[str, StoredTensor], expected: set[str]) -> dict[str, StoredTensor]:
    if found.keys() != expected:
        wrong = list_names(found.keys() ^ expected)
        raise CheckpointError(f"{path} and {INDEX_NAME} disagree on {wrong}; download or save the checkpoint again.")
    return found


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = read_json(path).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map, expected an object from tensor names to file names.")
    for name, file_name in weight_map.items():
        plain = isinstance(file_name, str) and Path(file_name).name == file_name and "\\" not in file_name
        if not plain or not file_name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} says that {name} is in {file_name!r}, expected the name of a .safetensors file beside it."
            )
    return weight_map


def _no_weights(directory: Path) -> str:
    pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if pickles:
        return (
            f"{directory} holds {pickles[0]} and no safetensors file; pickle files can run code and are never "
            "loaded, so convert it to safetensors first."
        )
    return f"{directory} holds neither {SINGLE_NAME} nor {INDEX_NAME}; give the directory of a saved model."


def list_names(names: Any, most: int = 10) -> str:
    """Return the first names of a set, sorted, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more
