"""How sequences are cut into chunks, and these into segments, without a look at a tensor's values on the host."""

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Runs of chunks: offsets of their tokens [S + 1], their first chunk [S], and each sequence's first run [N + 1].

    `count` bounds them from above; a surplus one has no tokens.
    """

    cu_seqlens: Tensor
    chunk: Tensor
    first: Tensor

    @property
    def count(self) -> int:
        """Segments there is room for."""
        return self.chunk.shape[0]


@dataclass(frozen=True)
class Chunks:
    """Chunks of C tokens: offsets of the sequences' tokens [N + 1] and chunks [N + 1], and each chunk's sequence.

    `count` bounds the chunks from above without a look at the offsets; a surplus chunk has sequence N.
    """

    cu_seqlens: Tensor
    first: Tensor
    owner: Tensor
    size: int
    # By length in chunks.
    cuts: dict[int, Segments] = field(default_factory=dict, compare=False)

    @property
    def sequences(self) -> int:
        """N."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def count(self) -> int:
        """Chunks there is room for."""
        return self.owner.shape[0]

    def segments(self, length: int, bound: int) -> Segments:
        """Return the segments of `length` chunks, at most `bound` of them."""
        if length not in self.cuts:
            self.cuts[length] = self._cut_segments(length, bound)
        return self.cuts[length]

    def _cut_segments(self, length: int, bound: int) -> Segments:
        first, owner = _cut_runs(self.cu_seqlens, bound, length * self.size)
        index = torch.arange(bound, device=owner.device) - first[owner]
        end = self.cu_seqlens[-1:]
        starts = torch.minimum(self.cu_seqlens[owner] + index * (length * self.size), end)
        return Segments(torch.cat([starts, end]), self.first[owner] + index * length, first)


def cut(cu_seqlens: Tensor | None, B: int, T: int, size: int, device: torch.device) -> Chunks:
    """Cut B sequences of T tokens, or the packed ones of T tokens, into chunks."""
    if cu_seqlens is None:
        return _cut_equal(B, T, size, device)
    return _cut(cu_seqlens, -(-T // size) + cu_seqlens.shape[0] - 1, size)


def _cut_equal(B: int, T: int, size: int, device: torch.device) -> Chunks:
    if device.type != "cuda":
        return _offsets_of_equal(B, T, size, device)
    if torch.cuda.is_current_stream_capturing():
        # What is made inside a graph holds no values outside of it.
        return _offsets_of_equal.__wrapped__(B, T, size, device)
    return _offsets_of_equal(B, T, size, device, torch.cuda.current_stream(device).cuda_stream)


@functools.lru_cache(maxsize=64)
def _offsets_of_equal(B: int, T: int, size: int, device: torch.device, stream: int = 0) -> Chunks:
    """Return the chunks of equal sequences; kept a stream, whose order makes sure that they are written."""
    return _cut(torch.arange(B + 1, device=device) * T, B * -(-T // size), size)


def _cut(cu_seqlens: Tensor, bound: int, size: int) -> Chunks:
    first, owner = _cut_runs(cu_seqlens, bound, size)
    return Chunks(cu_seqlens, first, owner, size)


def _cut_runs(cu_seqlens: Tensor, bound: int, size: int) -> tuple[Tensor, Tensor]:
    """Cut sequences into runs of `size` tokens: each sequence's first run [N + 1], each run's sequence [bound]."""
    runs = (cu_seqlens.diff() + size - 1) // size
    first = torch.nn.functional.pad(runs.cumsum(0), (1, 0)).to(torch.int32)
    numbers = torch.arange(bound, device=cu_seqlens.device, dtype=torch.int32)
    return first, torch.searchsorted(first[1:], numbers, right=True, out_int32=True)
