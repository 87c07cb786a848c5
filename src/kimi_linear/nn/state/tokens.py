"""What the attention layers remember: something of every token, or of the last ones in a ring."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from kimi_linear.nn.state.base import LayerState, Snapshot
from kimi_linear.ops.checks import check_cu_seqlens_values


@dataclasses.dataclass(frozen=True)
class History:
    """Everything the queries of one call may see: past and new tokens, as attention wants them.

    Fields: `tensors`, [B, S, ...] each, or packed [1, S, ...]; `cu_seqlens` of the queries and `cu_seqlens_k` of the
    keys when packed, else None.
    """

    tensors: tuple[Tensor, ...]
    cu_seqlens: Tensor | None
    cu_seqlens_k: Tensor | None


@dataclasses.dataclass
class TokenState(LayerState):
    """A state with something of every token (or of the last `window`), in buffers [N, capacity, ...].

    `lengths` [N], int64, on the host: tokens seen so far by each row. With a window, token t stands at slot t mod
    window; without, at slot t.
    """

    # The buffer fields, in the order in which `extend` and `append` take their tensors.
    BUFFERS: ClassVar[tuple[str, ...]]
    MINIMUM_CAPACITY: ClassVar[int] = 16

    lengths: Tensor
    window: int | None = dataclasses.field(default=None, kw_only=True)

    @property
    def layout(self) -> str:
        """How to read the buffers: the order of their axes, and the length of the ring if they are one."""
        return self.LAYOUT if self.window is None else f"{self.LAYOUT}, ring of {self.window}"

    def _buffers(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.BUFFERS]

    @property
    def capacity(self) -> int:
        """Tokens a row can hold before the buffers grow."""
        return self._buffers()[0].shape[1]

    @property
    def used(self) -> Tensor:
        """Tokens each row holds now, [N]."""
        return self.lengths if self.window is None else self.lengths.clamp(max=self.window)

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens held."""
        bytes_per_token = sum(buffer[0, 0].nbytes for buffer in self._buffers()) if self.capacity else 0
        return int(self.used.sum()) * bytes_per_token

    @property
    def allocated_nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self._buffers())

    def reserve(self, tokens: int) -> None:
        """Grow the buffers in place to hold `tokens` a row, at least doubling; a ring never exceeds its window."""
        wanted = tokens if self.window is None else min(tokens, self.window)
        if wanted <= self.capacity:
            return
        capacity = max(wanted, 2 * self.capacity, self.MINIMUM_CAPACITY)
        capacity = capacity if self.window is None else min(capacity, self.window)
        for name, buffer in zip(self.BUFFERS, self._buffers(), strict=True):
            grown = buffer.new_zeros(buffer.shape[0], capacity, *buffer.shape[2:])
            grown[:, : buffer.shape[1]] = buffer
            setattr(self, name, grown)

    def append(self, new: tuple[Tensor, ...]) -> None:
        """Add one token to every row, in place; each tensor is [N, ...]."""
        self.reserve(int(self.lengths.max()) + 1)
        slots = self.lengths if self.window is None else self.lengths % self.window
        slots = slots.to(new[0].device, non_blocking=True)
        rows = torch.arange(self.batch_size, device=new[0].device)
        for buffer, tensor in zip(self._buffers(), new, strict=True):
            buffer[rows, slots] = tensor.detach().to(buffer.dtype)
        self.lengths = self.lengths + 1

    def extend(self, new: tuple[Tensor, ...], cu_seqlens: Tensor | None) -> History:
        """Add new tokens, in place, and return everything their queries may see.

        Args:
            new: One tensor a buffer, [N, T, ...], or packed [1, T, ...] with one sequence a row of this state.
            cu_seqlens: Offsets [N + 1] when packed.

        Raises:
            ShapeError: The offsets fall, or do not run from 0 to T; nothing is changed then.

        Returns:
            Past and new tokens; dense if all rows are equally long and `new` is, else packed. New tokens keep their
            gradient, past ones have none.
        """
        T, device = new[0].shape[1], new[0].device
        starts = self.lengths.tolist()
        if cu_seqlens is None:
            counts = [T] * self.batch_size
        else:
            check_cu_seqlens_values(cu_seqlens, T)
            counts = cu_seqlens.diff().tolist()
        if cu_seqlens is None and len(set(starts)) == 1:
            past = self._past_slots(starts[0]).to(device)
            seen = [torch.cat([buffer[:, past], x.to(buffer.dtype)], dim=1) for buffer, x in self._pairs(new)]
            history = History(tuple(seen), None, None)
        else:
            history = self._packed_history(new, starts, counts)
        self._write(new, starts, counts)
        return history

    def _pairs(self, new: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self._buffers(), new, strict=True))

    def _past_slots(self, length: int) -> Tensor:
        """Slots of the past tokens that the next query may see, oldest first."""
        if self.window is None:
            return torch.arange(length)
        return torch.arange(max(0, length - self.window + 1), length) % self.window

    def _packed_history(self, new: tuple[Tensor, ...], starts: list[int], counts: list[int]) -> History:
        device = new[0].device
        slots = [self._past_slots(start).to(device) for start in starts]
        seen = []
        for buffer, tensor in self._pairs(new):
            rows = tensor.flatten(0, 1).to(buffer.dtype).split(counts)
            parts = [part for row, tokens in enumerate(rows) for part in (buffer[row, slots[row]], tokens)]
            seen.append(torch.cat(parts).unsqueeze(0))
        totals = [len(past) + count for past, count in zip(slots, counts, strict=True)]
        return History(tuple(seen), _offsets(counts, device), _offsets(totals, device))

    def _write(self, new: tuple[Tensor, ...], starts: list[int], counts: list[int]) -> None:
        self.reserve(max(start + count for start, count in zip(starts, counts, strict=True)))
        source, rows, slots = [], [], []
        offset = 0
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            # Of more new tokens than the ring holds only the last are written: each slot is written once.
            first = 0 if self.window is None else max(0, count - self.window)
            source.append(torch.arange(offset + first, offset + count))
            rows.append(torch.full((count - first,), row))
            slots.append(torch.arange(start + first, start + count))
            offset += count
        device = new[0].device
        index, row_index, slot_index = (torch.cat(parts).to(device) for parts in (source, rows, slots))
        slot_index = slot_index if self.window is None else slot_index % self.window
        for buffer, tensor in self._pairs(new):
            buffer[row_index, slot_index] = tensor.detach().flatten(0, 1)[index].to(buffer.dtype)
        self.lengths = self.lengths + torch.tensor(counts, device="cpu")

    def snapshot(self) -> Snapshot:
        """Return copies of the used part of the buffers, the lengths and the tags; changes nothing."""
        used = int(self.used.max())
        return {**super().snapshot(), **{name: getattr(self, name)[:, :used].clone() for name in self.BUFFERS}}

    def _fixed_shape(self, name: str, tensor: Tensor) -> tuple[int, ...]:
        # The capacity may differ.
        return (tensor.shape[0], *tensor.shape[2:]) if name in self.BUFFERS else tuple(tensor.shape)


@dataclasses.dataclass
class MLAState(TokenState):
    """What latent attention remembers: `latent` [N, capacity, R] after its norm, `key_rope` [N, capacity, dr]."""

    KIND: ClassVar[str] = "mla"
    LAYOUT: ClassVar[str] = "NTR"
    BUFFERS: ClassVar[tuple[str, ...]] = ("latent", "key_rope")

    latent: Tensor
    key_rope: Tensor


@dataclasses.dataclass
class GQAState(TokenState):
    """What softmax attention remembers: `keys` and `values` [N, capacity, Hkv, K], keys already rotated."""

    KIND: ClassVar[str] = "gqa"
    LAYOUT: ClassVar[str] = "NTHK"
    BUFFERS: ClassVar[tuple[str, ...]] = ("keys", "values")

    keys: Tensor
    values: Tensor


def _offsets(counts: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).to(device, torch.int32)
