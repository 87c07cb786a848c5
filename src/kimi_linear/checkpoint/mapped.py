"""Tensors as windows: of a checkpoint of any size only what is asked for is mapped, for as long as it is used.

A window is a mapping of the pages of one tensor, or of some rows of it. It is unmapped with the last tensor that views
it, so resident memory and address space are those of the tensors in use.
"""

import math
import mmap
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kimi_linear.base.errors import CheckpointError
from kimi_linear.checkpoint.layout import check_fits
from kimi_linear.checkpoint.reader import stored_tensors
from kimi_linear.checkpoint.writer import DTYPE_NAMES
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.models.kimi_linear.dialects import Move
from kimi_linear.models.kimi_linear.keys import release_tensors

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def map_window(path: Path, start: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the tensor at byte `start` of a file, as a view of a mapping of its own pages.

    Writing to the tensor does not change the file. A start that is no multiple of the element's size costs a copy.

    Raises:
        CheckpointError: The file is missing or too short, or there is no address space left.
    """
    count = math.prod(shape)
    if count == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    before = start % mmap.ALLOCATIONGRANULARITY
    length = before + count * dtype.itemsize
    try:
        with path.open("rb") as file:
            window = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=start - before)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot map {length} bytes of {path} ({error}); check the file and the limit on address space."
        ) from error
    if start % dtype.itemsize:
        return torch.frombuffer(window, dtype=torch.uint8, offset=before).clone().view(dtype).view(tuple(shape))
    return torch.frombuffer(window, dtype=dtype, offset=before).view(tuple(shape))


class MappedCheckpoint:
    """The tensors of a checkpoint in any layout, under their release names, mapped when they are asked for.

    `bytes_read` counts the bytes of all windows so far; `stored_bytes`, those of all tensors.

    Args:
        directory: Of the checkpoint.
        config: Its model.

    Raises:
        CheckpointError: The files are missing or damaged, or do not fit the configuration.
    """

    def __init__(self, directory: Path, config: KimiLinearConfig) -> None:
        self.directory = directory
        self.bytes_read = 0
        self._stored = stored_tensors(directory)
        self._moves: dict[str, list[Move]] = {}
        for move in check_fits(self._stored, config, directory):
            self._moves.setdefault(move.release, []).append(move)
        self._shapes = {name: shape for name, (shape, _) in release_tensors(config).items()}

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(tensor.nbytes for tensor in self._stored.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding as stored."""
        return _DTYPES[self._stored["model.embed_tokens.weight"].dtype]

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Return a release tensor, or some of its rows, in its release shape and stored dtype.

        A window where the file holds it in one run, which is all of the release's own layout; else a copy.
        """
        shape = self._shapes[name]
        moves = self._moves[name]
        if moves[0].rows is None:
            piece = self._piece(moves[0], () if rows is None else (rows,))
            return piece.reshape(-1, *shape[1:])
        pieces = [self._piece(move) for move in moves]
        whole = torch.empty(shape, dtype=pieces[0].dtype)
        for move, piece in zip(moves, pieces, strict=True):
            target = whole.view(move.groups, -1, *shape[1:])[:, move.rows]
            target.copy_(piece.reshape(target.shape))
        return whole if rows is None else whole[rows]

    def _piece(self, move: Move, rows: tuple[slice, ...] = ()) -> Tensor:
        stored = self._stored[move.stored]
        dtype = _DTYPES[stored.dtype]
        start, shape = _run(move.shape, move.take + rows)
        window = map_window(stored.file, stored.start + start * dtype.itemsize, shape, dtype)
        self.bytes_read += window.nbytes
        return window.transpose(-1, -2) if move.swap else window


def _run(shape: tuple[int, ...], take: tuple[int | slice, ...]) -> tuple[int, tuple[int, ...]]:
    """Return the first element and the shape of a piece that is one run of a tensor: indices, then at most a slice."""
    start = 0
    for place, index in enumerate(take):
        first, *rest = shape
        row = math.prod(rest)
        if isinstance(index, int):
            start, shape = start + index * row, tuple(rest)
            continue
        assert place == len(take) - 1, f"{take} is not one run"
        begin, end, _ = index.indices(first)
        start, shape = start + begin * row, (end - begin, *rest)
    return start, shape
