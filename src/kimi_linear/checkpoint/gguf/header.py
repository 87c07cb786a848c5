"""What a GGUF file says it holds. Every count and offset is checked against the file before it is used.

A file is a magic number, a version, the numbers of tensors and of metadata entries, the entries (name, type, value),
the tensors' descriptions (name, sizes, type, offset), and their bytes, aligned.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kimi_linear.base.errors import CheckpointError

# Format and numpy type of each scalar, by the number of its type.
_SCALARS = ("u1", "i1", "u2", "i2", "u4", "i4", "f4", "?", None, None, "u8", "i8", "f8")
_STRING, _ARRAY = 8, 9
# Far above any model's, far below what would take long to walk.
_MOST_ENTRIES, _MOST_TENSORS, _MOST_STRINGS = 1 << 16, 1 << 20, 1 << 24


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies: shape with the slowest axis first, number of its type, first byte, bytes of a row."""

    shape: tuple[int, ...]
    kind: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata (lists of strings are left out) and tensors of a file, both by name."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


class _Cursor:
    """Reads forwards and never beyond the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> int:
        """Step over bytes; return where they begin."""
        start, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise CheckpointError("it ends inside its header.")
        return start

    def number(self, code: str) -> Any:
        return struct.unpack_from(f"<{code}", self.data, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        length = self.number("Q")
        start = self.take(length)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"its header has a name or text that is not UTF-8 at byte {start}.") from error

    def value(self, kind: int) -> Any:
        """Return a scalar, a string, a list of scalars, or None for a list of strings."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(self.number("I"), self.number("Q"))
        return self.scalars(kind, 1)[0]

    def array(self, kind: int, count: int) -> list[Any] | None:
        if kind != _STRING:
            return self.scalars(kind, count)
        if count > _MOST_STRINGS:
            raise CheckpointError(f"its header has a list of {count} strings; that is no model's.")
        for _ in range(count):
            self.take(self.number("Q"))
        return None

    def scalars(self, kind: int, count: int) -> list[Any]:
        code = _SCALARS[kind] if kind < len(_SCALARS) else None
        if code is None:
            raise CheckpointError(f"its header has a value of type {kind}, which GGUF does not have.")
        dtype = np.dtype(code).newbyteorder("<")
        start = self.take(count * dtype.itemsize)
        return np.frombuffer(self.data[start : self.at], dtype).tolist()


def read_header(path: Path, sizes: Mapping[int, tuple[int, int]]) -> GGUFHeader:
    """Return what a file says it holds.

    Args:
        path: The file.
        sizes: Numbers in a block, and bytes of it, by the number of a tensor type.

    Raises:
        CheckpointError: Not a whole GGUF file of version 2 or 3; the sentence continues one that names the file.
    """
    if path.stat().st_size < 24:
        raise CheckpointError("it ends inside its header.")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data)
        if data[cursor.take(4) : 4] != b"GGUF":
            raise CheckpointError("it does not begin with GGUF.")
        version = cursor.number("I")
        if version not in (2, 3):
            raise CheckpointError(f"it is of GGUF version {version}, expected 2 or 3 in little-endian order.")
        tensors, entries = cursor.number("Q"), cursor.number("Q")
        if tensors > _MOST_TENSORS or entries > _MOST_ENTRIES:
            raise CheckpointError(f"it claims {tensors} tensors and {entries} entries of metadata; that is no model's.")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            name = cursor.string()
            if name in metadata:
                raise CheckpointError(f"it has the metadata {name!r} twice.")
            metadata[name] = cursor.value(cursor.number("I"))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(f"its alignment is {alignment!r}, expected a power of two.")
        return GGUFHeader(metadata, _tensors(cursor, tensors, alignment, sizes))


def _tensors(
    cursor: _Cursor, count: int, alignment: int, sizes: Mapping[int, tuple[int, int]]
) -> dict[str, GGUFTensor]:
    described: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name = cursor.string()
        axes = cursor.number("I")
        if name in described or not 1 <= axes <= 4:
            raise CheckpointError(f"tensor {name} is there twice or has {axes} axes, expected once and 1 to 4.")
        shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]
        described[name] = (shape, cursor.number("I"), cursor.number("Q"))
    begin = -(-cursor.at // alignment) * alignment
    tensors, end = {}, begin
    for name, (shape, kind, offset) in sorted(described.items(), key=lambda item: item[1][2]):
        if kind not in sizes:
            raise CheckpointError(f"tensor {name} is of type {kind}, which the package gguf does not know.")
        block, itemsize = sizes[kind]
        if min(shape) < 1 or shape[-1] % block or offset % alignment:
            raise CheckpointError(f"tensor {name} {list(shape)} at {offset} is not made of whole, aligned blocks.")
        tensor = GGUFTensor(shape, kind, begin + offset, math.prod(shape) // block * itemsize)
        if tensor.start < end:
            raise CheckpointError(f"tensor {name} overlaps the one before it.")
        end = tensor.start + tensor.nbytes
        if end > len(cursor.data):
            raise CheckpointError(f"it ends inside tensor {name}, at {len(cursor.data)} of {end} bytes or more.")
        tensors[name] = tensor
    return tensors
