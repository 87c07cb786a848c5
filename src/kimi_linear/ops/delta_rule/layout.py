"""How tokens are cut into chunks and chunks into tiles, and how a tile is gathered from and scattered to tensors.

Chunks never straddle sequences. Sequences advance together: wave w holds the w-th chunk of every sequence that is
long enough. A tile is a few consecutive waves of a group of sequences; all of its chunks are prepared at once, then its
waves are visited one after the other. Tiles bound the temporary memory whatever the length. Letters: n sequences of a
group, M chunks of a tile (all its waves one after the other), C chunk length, R = M * HV rows.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from kimi_linear.ops.checks import check_cu_seqlens_values


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def expand_heads(x: Tensor, heads: int, dim: int = 2) -> Tensor:
    """Repeat each key head for the value heads of its group: value head h reads key head h // (HV / H)."""
    return x if x.shape[dim] == heads else x.repeat_interleave(heads // x.shape[dim], dim)


def sum_heads(x: Tensor, heads: int, dim: int = 2) -> Tensor:
    """Sum value heads into their key heads: the transpose of `expand_heads`, in a fixed order."""
    return x if x.shape[dim] == heads else x.unflatten(dim, (heads, x.shape[dim] // heads)).sum(dim + 1)


def read_cu_seqlens(cu_seqlens: Tensor, total: int) -> list[int]:
    """Return packed offsets as integers, or raise ShapeError if they do not rise from 0 to `total`."""
    check_cu_seqlens_values(cu_seqlens, total)
    return cast("list[int]", cu_seqlens.tolist())


def sequence_bounds(cu_seqlens: Tensor | None, x: Tensor) -> list[tuple[int, int, int]]:
    """Return (batch row, first token, end) of every sequence of x [B, T, ..]."""
    if cu_seqlens is None:
        return [(row, 0, x.shape[1]) for row in range(x.shape[0])]
    offsets = read_cu_seqlens(cu_seqlens, x.shape[1])
    return [(0, start, end) for start, end in itertools.pairwise(offsets)]


@dataclass(frozen=True)
class DenseTile:
    """Tokens [start, end) of batch rows [first, last): equally long sequences, cut by slicing."""

    first: int
    last: int
    start: int
    end: int
    chunk: int

    @property
    def waves(self) -> list[int]:
        """Number of sequences in each wave."""
        return [self.last - self.first] * -(-(self.end - self.start) // self.chunk)

    def load(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return x [B, T, heads, dim] as [M, heads, C, dim]; rows past the end of a sequence are zero."""
        part = x[self.first : self.last, self.start : self.end]
        n, tokens, heads, dim = part.shape
        full, rest = divmod(tokens, self.chunk)
        tile = torch.empty(len(self.waves), n, heads, self.chunk, dim, dtype=dtype, device=x.device)
        tile[:full].copy_(part[:, : full * self.chunk].unflatten(1, (full, self.chunk)).permute(1, 0, 3, 2, 4))
        if rest:
            tile[full, :, :, :rest].copy_(part[:, full * self.chunk :].transpose(1, 2))
            tile[full, :, :, rest:] = 0
        return tile.flatten(0, 1)

    def store(self, target: Tensor, value: Tensor) -> None:
        """Write [M, heads, C, dim] back to its tokens of target [B, T, heads, dim]."""
        part = target[self.first : self.last, self.start : self.end]
        full, rest = divmod(part.shape[1], self.chunk)
        value = value.unflatten(0, (len(self.waves), -1))
        part[:, : full * self.chunk].unflatten(1, (full, self.chunk)).copy_(value[:full].permute(1, 0, 3, 2, 4))
        if rest:
            part[:, full * self.chunk :].copy_(value[full, :, :, :rest].transpose(1, 2))

    def valid(self, device: torch.device) -> Tensor | None:
        """Return which rows hold tokens, bool [M, C], or None if all do."""
        rest = (self.end - self.start) % self.chunk
        if not rest:
            return None
        valid = torch.ones(len(self.waves), self.last - self.first, self.chunk, dtype=torch.bool, device=device)
        valid[-1, :, rest:] = False
        return valid.flatten(0, 1)


@dataclass(frozen=True)
class PackedTile:
    """Chunks of packed sequences of different lengths, gathered by token index."""

    waves: list[int]
    # Token of every row, [M, C]; rows past the end of a sequence point at some token and are masked.
    index: Tensor
    mask: Tensor

    def load(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return x [1, T, heads, dim] as [M, heads, C, dim]; rows past the end of a sequence are zero."""
        rows = x[0].index_select(0, self.index.flatten()).unflatten(0, self.index.shape)
        tile = torch.empty_like(rows.transpose(1, 2), dtype=dtype, memory_format=torch.contiguous_format)
        tile.copy_(rows.transpose(1, 2))
        return tile.masked_fill_(~self.mask[:, None, :, None], 0)

    def store(self, target: Tensor, value: Tensor) -> None:
        """Write [M, heads, C, dim] back to its tokens of target [1, T, heads, dim]."""
        target[0].index_copy_(0, self.index[self.mask], value.transpose(1, 2)[self.mask].to(target.dtype))

    def valid(self, device: torch.device) -> Tensor | None:
        """Return which rows hold tokens, bool [M, C]."""
        return self.mask


Tile = DenseTile | PackedTile


@dataclass(frozen=True)
class Group:
    """Sequences that advance together, longest first, and their tiles in order."""

    # Which sequences, [n]; a slice where they are consecutive, so that states are views.
    sequences: Tensor | slice
    tiles: list[Tile]


def chunk_length(longest: int, limit: int) -> int:
    """Return the chunk length for sequences up to `longest` tokens: a power of two, at most `limit`."""
    length = 1
    while length < min(longest, limit):
        length *= 2
    return length


def group_size(chunks: int, rows: int, least: int) -> int:
    """Return how many sequences of `chunks` chunks advance together in tiles of `rows` chunks.

    As many as fit a tile whole, for a group of one tile needs no second sweep in the backward; but at least `least`, so
    that the products of one wave keep the machine busy.
    """
    return max(1, min(rows, max(least, rows // max(1, chunks))))


def plan_dense(B: int, T: int, chunk: int, rows: int, least: int) -> Iterator[Group]:
    """Cut B sequences of T tokens into groups and tiles of at most `rows` chunks a tile (at least one)."""
    n = min(B, group_size(-(-T // chunk), rows, least))
    step = max(1, rows // max(1, n)) * chunk
    for first in range(0, B, max(1, n)):
        last = min(first + n, B)
        tiles: list[Tile] = [DenseTile(first, last, start, min(start + step, T), chunk) for start in range(0, T, step)]
        yield Group(slice(first, last), tiles)


def plan_packed(offsets: list[int], limit: int, tokens: int, least: int, device: torch.device) -> Iterator[Group]:
    """Cut packed sequences into groups and tiles of at most `tokens` tokens a tile (at least one chunk).

    The sequences of a group have one chunk length, that which each would have alone: what else is in the pack does not
    touch a sequence's result, and short sequences beside a long one are not padded to its chunks. Empty sequences are
    in no group.
    """
    starts = torch.tensor(offsets[:-1])
    lengths = torch.tensor(offsets[1:]) - starts
    # Longest first, so that the sequences still active in a wave are a prefix of the group.
    order = torch.argsort(lengths, descending=True, stable=True)
    order = order[lengths[order] > 0]
    while len(order):
        chunk = chunk_length(int(lengths[order[0]]), limit)
        rows = max(1, tokens // chunk)
        alike = int((lengths[order] > chunk // 2).sum())
        n = min(alike, group_size(-(-int(lengths[order[0]]) // chunk), rows, least))
        sequences, order = order[:n], order[n:]
        tiles = _packed_tiles(starts[sequences], lengths[sequences], chunk, rows, device)
        yield Group(sequences.to(device), list(tiles))


def _packed_tiles(starts: Tensor, lengths: Tensor, chunk: int, rows: int, device: torch.device) -> Iterator[Tile]:
    """Cut a group's sequences, longest first, into tiles of whole waves."""
    chunks = -(-lengths // chunk)
    active = (chunks[:, None] > torch.arange(int(chunks[0]))).sum(0).tolist()
    steps = torch.arange(chunk)
    wave = 0
    while wave < len(active):
        end, held = wave + 1, active[wave]
        while end < len(active) and held + active[end] <= rows:
            held += active[end]
            end += 1
        at = torch.cat([torch.full((active[w],), w * chunk) for w in range(wave, end)])
        who = torch.cat([torch.arange(active[w]) for w in range(wave, end)])
        within, limits = at[:, None] + steps, lengths[who][:, None]
        # Rows past the end point at the last token of their sequence.
        index = starts[who][:, None] + within.minimum(limits - 1)
        yield PackedTile(active[wave:end], index.to(device), (within < limits).to(device))
        wave = end


def weighed(x: Tensor, strength: Tensor) -> Tensor:
    """Return strength * x in the wide dtype, the heads of x expanded; a strength a head gains a last axis."""
    dtype, dim = wide_dtype(x.dtype), x.dim() - 2
    strength = strength if strength.dim() == x.dim() else strength.unsqueeze(-1)
    return expand_heads(x, strength.shape[dim], dim).to(dtype) * strength.to(dtype)
