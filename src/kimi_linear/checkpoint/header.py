"""The header of a safetensors file: what lies where, held against the file's size, without mapping the file.

A file is eight bytes with the header's length (little-endian), the header (JSON: name -> dtype, shape, byte range), and
the tensors' bytes without gaps. https://github.com/huggingface/safetensors#format
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_linear.base.config import MAX_JSON_BYTES, parse_json
from kimi_linear.base.errors import CheckpointError, ConfigError, plain, shown

# Of one checkpoint: more than ten times the released model's. It bounds what reading the headers takes.
MAX_TENSORS = 2**18
# Bits of an element of every dtype that the format knows.
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True)
class StoredTensor:
    """What a file's header says of one tensor: the format's own name of its dtype ("BF16"), and its bytes' range."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.stop - self.start


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a file by name.

    Raises:
        CheckpointError: The file is missing, not a regular one, or cut off; its header is no JSON of the format, or
            longer than MAX_JSON_BYTES, or holds more than MAX_TENSORS tensors; tensors overlap or leave gaps, or one
            has another number of bytes than its shape and dtype say.
    """
    check_regular(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_JSON_BYTES:
                raise ValueError(f"its header claims {length} bytes, the most that is read is {MAX_JSON_BYTES}")
            text = file.read(length)
        if len(text) < length or not text:
            raise ValueError(f"its header claims {length} bytes and has {len(text)}")
        header = parse_json(text, "its header")
        check_count(len(header), path)
        offset = 8 + length
        _check_metadata(header.get("__metadata__", {}))
        entries = {name: _entry(path, name, given, offset) for name, given in header.items() if name != "__metadata__"}
        _check_ranges(entries, offset, size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except CheckpointError:
        raise
    except (ConfigError, ValueError) as error:
        raise not_whole(path, str(error).removesuffix(".")) from error
    return entries


def check_regular(path: Path) -> None:
    """Raise CheckpointError unless a path is a regular file, or a link to one."""
    # Opening a pipe would wait for its other end, and a device has no end.
    try:
        regular, exists = path.is_file(), path.exists()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}.") from error
    if not exists:
        raise CheckpointError(f"{path} does not exist, though the checkpoint's index names it; download it.")
    if not regular:
        raise CheckpointError(f"{path} is not a regular file; download or save it again.")


def check_count(count: int, where: Path) -> None:
    """Raise CheckpointError for more tensors than a checkpoint may have."""
    if count > MAX_TENSORS:
        raise CheckpointError(f"{where} holds {count} tensors, expected at most {MAX_TENSORS}.")


def not_whole(path: Path, reason: str) -> CheckpointError:
    """Return the error of a damaged file."""
    return CheckpointError(f"{path} is not a whole safetensors file ({plain(reason)}); download or save it again.")


def _check_metadata(given: Any) -> None:
    if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
        raise ValueError("its __metadata__ is not an object of texts")


def _entry(path: Path, name: str, given: Any, offset: int) -> StoredTensor:
    if not isinstance(given, dict) or given.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{plain(name)} has no dtype, shape and data_offsets")
    dtype, shape, offsets = given["dtype"], given["shape"], given["data_offsets"]
    if not isinstance(dtype, str) or not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{plain(name)} has a dtype, shape or data_offsets of the wrong kind")
    # A name must be text: half a character is none.
    name.encode()
    if dtype not in _BITS:
        raise ValueError(f"{plain(name)} has the dtype {shown(dtype)}, which is none of the format")
    start, stop = offsets
    if _count(shape, 2 * stop) * _BITS[dtype] != 8 * (stop - start):
        raise ValueError(f"{plain(name)} takes bytes {start} to {stop}, which is not {dtype} {shown(shape)}")
    return StoredTensor(path, tuple(shape), dtype, offset + start, offset + stop)


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


def _check_ranges(entries: dict[str, StoredTensor], start: int, size: int) -> None:
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != start or entry.stop < start:
            raise ValueError(
                f"{plain(name)} begins at byte {entry.start}, expected {start}: tensors overlap or leave a gap"
            )
        start = entry.stop
    if start != size:
        raise ValueError(f"its tensors end at byte {start}, the file at {size}")
