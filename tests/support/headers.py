"""Checkpoints without data: true safetensors headers over bytes that were never written, so that any size costs none.

A tensor is (shape, dtype), the dtype by the format's own name; a shard is a dict of them by name, in file order.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I8": 1}

Tensor = tuple[tuple[int, ...], str]
Shard = Mapping[str, Tensor]


def nbytes(tensor: Tensor) -> int:
    """Return the bytes of one tensor."""
    return math.prod(tensor[0]) * ITEMSIZE[tensor[1]]


def header(shard: Shard) -> bytes:
    """Return the header as the format's own library writes it: wide types first, then by name, padded with spaces."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in sorted(shard.items(), key=lambda item: (-ITEMSIZE[item[1][1]], item[0])):
        end = offset + nbytes(tensor)
        entries[name] = {"dtype": tensor[1], "shape": list(tensor[0]), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def file_size(shard: Shard) -> int:
    """Return the bytes of a shard's file."""
    return 8 + len(header(shard)) + sum(map(nbytes, shard.values()))


def write_shard(path: Path, shard: Shard) -> None:
    """Write the header, and give the file the size it claims."""
    text = header(shard)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file_size(shard))


def shard_name(number: int, of: int) -> str:
    """Return the name of the shard with this number, from 1."""
    return f"model-{number:05d}-of-{of:05d}.safetensors"


def index_json(shards: Iterable[Shard], parameters: int) -> str:
    """Return the index as the hub's tools write it: keys sorted, two spaces, a line end."""
    listed = list(shards)
    places = {name: shard_name(n, len(listed)) for n, shard in enumerate(listed, start=1) for name in shard}
    size = sum(nbytes(tensor) for shard in listed for tensor in shard.values())
    index = {"metadata": {"total_parameters": parameters, "total_size": size}, "weight_map": places}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"
