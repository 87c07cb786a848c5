"""Tensors out: safetensors shards with an index, one tensor in memory at a time.

A file is eight bytes with the header's length (little-endian), the header (JSON: name -> dtype, shape, byte range),
and the tensors' bytes without gaps. Larger element types come first, so that every tensor stays aligned.
https://github.com/huggingface/safetensors#format
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kimi_linear.base.errors import CheckpointError, ConfigError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str) -> int:
    """Return a number of bytes from 5_000_000_000, "5GB" (10**9) or "5GiB" (2**30).

    Raises:
        ConfigError: Not such a size, or zero.

    Example:
        >>> parse_size("1.5MB")
        1500000
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)?\s*", str(size), re.IGNORECASE)
    # The pattern admits units the table lacks (TiB); they read as an unknown size, not as another one.
    unit = _UNITS.get((match[2] or "").upper()) if match else None
    count = int(float(match[1]) * unit) if match and unit else 0
    if count < 1 or isinstance(size, bool):
        raise ConfigError(f"the shard size is {size!r}, expected a number of bytes or text such as '5GB' or '500MiB'.")
    return count


def split_shards(tensors: Mapping[str, Tensor], max_shard_size: int) -> list[dict[str, Tensor]]:
    """Cut tensors, in their order, into shards of at most `max_shard_size` bytes; a larger tensor gets its own."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


# The parts of a tensor by its name, in the order of its bytes.
Pieces = Callable[[str], Iterable[Tensor]]


def write_tensors(
    directory: Path,
    tensors: Mapping[str, Tensor],
    max_shard_size: int,
    *,
    pieces: Pieces | None = None,
    made_for: str = "pt",
) -> None:
    """Write the shards, and the index if there is more than one, into an existing directory.

    Args:
        directory: Where to write; nothing else in it is touched.
        tensors: By checkpoint name; views cost nothing, a tensor is copied only while it is written.
        max_shard_size: Bytes of tensors in a shard.
        pieces: Where the bytes come from, if `tensors` only give shapes and dtypes (on the meta device, for instance).
        made_for: The framework that the header names: "pt", or "mlx".

    Raises:
        OSError: The disk is full or not writable; what was written stays, so write into a temporary directory.
        CheckpointError: A tensor of a dtype that checkpoints do not hold.
    """
    shards = split_shards(tensors, max_shard_size)
    if len(shards) == 1:
        write_shard(directory / SINGLE_NAME, shards[0], pieces, made_for)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(directory / file_name, shard, pieces, made_for)
        weight_map.update(dict.fromkeys(shard, file_name))
    metadata = {
        "total_size": sum(tensor.nbytes for tensor in tensors.values()),
        "total_parameters": sum(tensor.numel() for tensor in tensors.values()),
    }
    index = {"metadata": metadata, "weight_map": weight_map}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_shard(path: Path, tensors: Mapping[str, Tensor], pieces: Pieces | None = None, made_for: str = "pt") -> None:
    """Write one safetensors file; arguments as for `write_tensors`."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header = _header(ordered, made_for)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for name, tensor in ordered:
            for piece in [tensor] if pieces is None else pieces(name):
                file.write(as_bytes(piece))


def as_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes; a view of it where it lies on the CPU without gaps."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


@contextmanager
def explain_write_errors(target: Path) -> Iterator[None]:
    """Turn the operating system's errors inside into a CheckpointError about saving to `target`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot save to {target}: {error.strerror or error}"
            f"{f' ({error.filename})' if error.filename else ''}; what was there before is unchanged."
        ) from error


def _header(tensors: list[tuple[str, Tensor]], made_for: str) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": made_for}}
    offset = 0
    for name, tensor in tensors:
        if tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(
                f"tensor {name} is {tensor.dtype}, expected a floating dtype; convert the model first."
            )
        end = offset + tensor.nbytes
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    # Spaces up to a multiple of eight keep the tensors behind it aligned.
    return text + b" " * (-len(text) % 8)
