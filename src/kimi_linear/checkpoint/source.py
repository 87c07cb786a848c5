"""A checkpoint of any kind as the tensors of the release, read one at a time from the mapped files."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kimi_linear.checkpoint.configs import read_end_tokens, read_model_json
from kimi_linear.checkpoint.gguf.read import open_gguf
from kimi_linear.checkpoint.hub import is_gguf, resolve
from kimi_linear.checkpoint.layout import check_fits, join_pieces
from kimi_linear.checkpoint.reader import open_shard, stored_tensors
from kimi_linear.checkpoint.writer import DTYPE_NAMES
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.models.kimi_linear.dialects import Move
from kimi_linear.models.kimi_linear.keys import release_tensors

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Source:
    """What a checkpoint holds, in the release's terms.

    `dtypes` has the stored dtype of every release tensor, and `read` returns one of them: a view of the mapped file
    where it is stored as it is, else a new tensor. `path` is the directory, or a GGUF file.
    """

    path: Path
    config: KimiLinearConfig
    dtypes: Mapping[str, torch.dtype]
    end_token_ids: tuple[int, ...]
    read: Callable[[str], Tensor]


def open_source(path: str | os.PathLike[str]) -> Source:
    """Check a checkpoint by every name, shape and dtype, and return it for reading. No tensor is read yet.

    Args:
        path: A directory in any layout, a hub name in the local cache, or a GGUF file.

    Raises:
        CheckpointError: Nothing there, damaged, or not of a model this package has.
    """
    found = resolve(path)
    if is_gguf(found):
        model = open_gguf(found)
        return Source(found, model.config, model.dtypes, model.end_token_ids, model.read)
    config = read_model_json(found)
    stored = stored_tensors(found)
    moves: dict[str, list[Move]] = {}
    for move in check_fits(stored, config, found):
        moves.setdefault(move.release, []).append(move)
    shapes = {name: shape for name, (shape, _) in release_tensors(config).items()}

    def stored_tensor(name: str) -> Tensor:
        with open_shard(stored[name].file) as file:
            return file.get_tensor(name)

    def read(name: str) -> Tensor:
        return join_pieces(shapes[name], moves[name], stored_tensor)

    dtypes = {name: _DTYPES[stored[of_name[0].stored].dtype] for name, of_name in moves.items()}
    return Source(found, config, dtypes, read_end_tokens(found), read)
