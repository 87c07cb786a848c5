"""A checkpoint's tensors under the release's names and shapes, whatever layout they are stored in.

They are views of the mapped files, so that a checkpoint larger than the memory can be read, compared and written anew;
only a tensor that is stored in two parts is put together in memory.
"""

from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path

from torch import Tensor

from kimi_linear.checkpoint.layout import join_pieces
from kimi_linear.checkpoint.reader import open_shard
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.models.kimi_linear.dialects import Move
from kimi_linear.models.kimi_linear.keys import release_tensors


def mapped_tensors(files: Mapping[str, Path]) -> dict[str, Tensor]:
    """Return tensors by name as views of the files that hold them; nothing is read yet.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    found: dict[str, Tensor] = {}
    for path, names in groupby(sorted(files, key=lambda name: (files[name], name)), key=lambda name: files[name]):
        with open_shard(path) as file:
            found |= {name: file.get_tensor(name) for name in names}
    return found


def assemble(stored: Mapping[str, Tensor], moves: Iterable[Move], config: KimiLinearConfig) -> dict[str, Tensor]:
    """Return the release's tensors that the moves describe, in the release's order and their stored dtypes."""
    by_release: dict[str, list[Move]] = {}
    for move in moves:
        by_release.setdefault(move.release, []).append(move)
    shapes = {name: shape for name, (shape, _) in release_tensors(config).items() if name in by_release}
    return {name: join_pieces(shape, by_release[name], stored.__getitem__) for name, shape in shapes.items()}
