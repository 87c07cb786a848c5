"""The header of a safetensors file: what lies where, held against the file's size, without mapping the file.

A file is eight bytes with the header's length (little-endian), the header (JSON: name -> dtype, shape, byte range), and
the tensors' bytes without gaps. https://github.com/huggingface/safetensors#format
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_linear.base.errors import CheckpointError
from kimi_linear.checkpoint.writer import DTYPE_NAMES

# The format's own limit on the header's length.
_MOST_BYTES = 100_000_000
_ITEMSIZES = {name: dtype.itemsize for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class HeaderEntry:
    """One tensor of a file: the format's name of its dtype, its shape, and the bytes of the file it takes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, HeaderEntry]:
    """Return every tensor of a file by name.

    Raises:
        CheckpointError: The file is missing or cut off, the header is not valid JSON of the format, tensors overlap or
            leave gaps, or one has another number of bytes than its shape and dtype say. The bytes of dtypes that no
            checkpoint of ours holds are not counted.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, _MOST_BYTES):
                raise ValueError(f"its header would be {length} bytes long, the file has {size}")
            entries = _parse(file.read(length), offset=8 + length)
        _check_ranges(entries, 8 + length, size)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist, though the checkpoint's index names it; download it.") from error
    except (ValueError, OSError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({reason}); download or save it again."
        ) from error
    return entries


def _parse(text: bytes, offset: int) -> dict[str, HeaderEntry]:
    header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repeats)
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    return {name: _entry(name, given, offset) for name, given in header.items() if name != "__metadata__"}


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("its header names something twice")
    return values


def _entry(name: str, given: Any, offset: int) -> HeaderEntry:
    if not isinstance(given, dict) or given.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} has no dtype, shape and data_offsets")
    dtype, shape, offsets = given["dtype"], given["shape"], given["data_offsets"]
    if not isinstance(dtype, str) or not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has a dtype, shape or data_offsets of the wrong kind")
    start, stop = offsets
    if dtype in _ITEMSIZES and _count(shape, stop) * _ITEMSIZES[dtype] != stop - start:
        raise ValueError(f"{name} takes bytes {start} to {stop}, which is not {dtype} {shape}")
    return HeaderEntry(dtype, tuple(shape), offset + start, offset + stop)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _count(shape: list[int], most: int) -> int:
    """Return the elements of a shape, or some number above `most`: a forged shape must not cost a huge product."""
    if 0 in shape:
        return 0
    count = 1
    for size in shape:
        count *= size
        if count > most:
            break
    return count


def _check_ranges(entries: dict[str, HeaderEntry], start: int, size: int) -> None:
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != start or entry.stop < start:
            raise ValueError(f"{name} begins at byte {entry.start}, expected {start}: tensors overlap or leave a gap")
        start = entry.stop
    if start != size:
        raise ValueError(f"its tensors end at byte {start}, the file at {size}")
