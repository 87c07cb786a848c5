"""Tensors in: which files hold a checkpoint, what each says it holds, and the tensors as views of the mapped file.

Nothing is trusted: file names in an index must be plain, only regular files are opened, headers are validated before a
byte of a tensor is read, and pickle files are never opened. Links are followed, as a hub cache is made of them; who can
place a link in a directory can place the file as well. A file must not be cut while it is mapped.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kimi_linear.base.config import read_json
from kimi_linear.base.errors import CheckpointError, ConfigError, list_names, plain, shown
from kimi_linear.checkpoint.header import StoredTensor, check_count, check_regular, not_whole, read_header
from kimi_linear.checkpoint.writer import INDEX_NAME, SINGLE_NAME

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a checkpoint by name, from the headers alone.

    Raises:
        CheckpointError: No safetensors file, a missing or damaged one, an index that does not match the files, or more
            than MAX_TENSORS tensors.
    """
    single, index = directory / SINGLE_NAME, directory / INDEX_NAME
    # Of os.path, for which what may not be looked at does not exist.
    if os.path.exists(single):
        return read_header(single)
    if not os.path.exists(index):
        raise CheckpointError(_no_weights(directory))
    weight_map = _read_index(index)
    found: dict[str, StoredTensor] = {}
    for file_name in sorted(set(weight_map.values())):
        held = read_header(directory / file_name)
        both = held.keys() & found.keys()
        if both:
            name = min(both)
            raise CheckpointError(
                f"{directory}: {found[name].file.name} and {file_name} both hold {list_names(both)}; remove the one "
                f"that does not belong to {INDEX_NAME}."
            )
        found |= held
        check_count(len(found), directory)
    _check_index(weight_map, found, index)
    return found


@contextmanager
def open_shard(path: Path) -> Iterator[Any]:
    """Open one safetensors file; `get_tensor(name)` returns a view of the mapped file, valid after closing too.

    Raises:
        CheckpointError: The file is missing, not a regular one, cut off, or its header is not valid.
    """
    check_regular(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise not_whole(path, str(error)) from error


def declared_bytes(directory: Path) -> int | None:
    """Return the bytes of all tensors that an index claims, None where there is no index or no such claim."""
    index = directory / INDEX_NAME
    if os.path.exists(directory / SINGLE_NAME) or not os.path.exists(index):
        return None
    metadata = read_json(index).get("metadata")
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    return size if type(size) is int else None


def _check_index(weight_map: Mapping[str, str], found: Mapping[str, StoredTensor], path: Path) -> None:
    """Raise CheckpointError, by name, unless an index and its files say the same of every tensor."""
    elsewhere = {name for name in weight_map.keys() & found.keys() if found[name].file.name != weight_map[name]}
    problems = {
        "names tensors that no file holds": weight_map.keys() - found.keys(),
        "does not name tensors that its files hold": found.keys() - weight_map.keys(),
        "names tensors in another file than the one that holds them": elsewhere,
    }
    wrong = [f"{what} ({list_names(names)})" for what, names in problems.items() if names]
    if wrong:
        raise CheckpointError(f"{path} {', and '.join(wrong)}; download or save the checkpoint again.")


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = read_json(path).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map, expected an object from tensor names to file names.")
    for name, file_name in weight_map.items():
        if not _is_shard_name(file_name):
            raise CheckpointError(
                f"{path} says that {plain(name)} is in {shown(file_name)}, expected the name of a .safetensors file "
                "beside it."
            )
    return weight_map


def _is_shard_name(name: object) -> bool:
    """Return whether a value is the plain name of a safetensors file; it cannot lead out of a directory."""
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and name.isprintable()
        and Path(name).name == name
        and "\\" not in name
    )


def _no_weights(directory: Path) -> str:
    try:
        pickles = sorted(name for name in os.listdir(directory) if name.endswith(PICKLES))
    except OSError as error:
        return f"{directory} cannot be read: {error.strerror}; give the directory of a saved model."
    if pickles:
        return (
            f"{directory} holds {plain(pickles[0])} and no safetensors file; pickle files can run code and are never "
            "loaded, so convert it to safetensors first."
        )
    return f"{directory} holds neither {SINGLE_NAME} nor {INDEX_NAME}; give the directory of a saved model."
