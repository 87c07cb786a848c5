"""The states of a pool that a call names by slot: taken out wide, put back rounded once; all others keep their bits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kimi_linear.base import env
from kimi_linear.base.errors import ShapeError
from kimi_linear.ops.checks import check_slots_values


def unread(x: Tensor) -> bool:
    """Return whether the host does not look at the values: on a GPU it would wait for them; KIMI_LINEAR_DEBUG waits."""
    return x.is_cuda and not env.read("KIMI_LINEAR_DEBUG")


def check_accepted_values(accepted: Tensor, T: int) -> None:
    """Raise ShapeError for a number of accepted tokens outside [0, T], where the host reads them."""
    values: list[int] = [] if unread(accepted) else accepted.tolist()
    for value in values:
        if not 0 <= value <= T:
            raise ShapeError(f"accepted holds {value}, expected 0 to {T}, the tokens of the trace.")


@dataclass(frozen=True)
class Picked:
    """The named states [n, HV, K, V], wide: a view of the pool where one will do, else a copy."""

    states: Tensor
    # How many sequences there are; which of them have these states, and in which rows of the pool.
    count: int
    sequences: Tensor | slice
    rows: Tensor | slice
    # Which sequences have a state, [N]; None: the host has read the slots and left the others out.
    live: Tensor | None = None

    def of(self, x: Tensor | None) -> Tensor | None:
        """Return the picked sequences' rows of x [N, ..]."""
        return None if x is None else x[self.sequences]

    def spread(self, x: Tensor) -> Tensor:
        """Return [N, ..] with x [n, ..] in the picked sequences' rows, zero elsewhere."""
        if self.live is not None:
            return torch.where(self.live.view(-1, *[1] * (x.dim() - 1)), x, 0)
        if isinstance(self.sequences, slice):
            return x
        whole = x.new_zeros(self.count, *x.shape[1:])
        whole[self.sequences] = x
        return whole

    def put_back(self, pool: Tensor) -> None:
        """Write the states to their rows, rounded to the pool's dtype."""
        if isinstance(self.rows, slice) and self.states.dtype == pool.dtype:
            return
        states = self.states.to(pool.dtype)
        if self.live is not None:
            states = torch.where(self.live.any(), states, pool[self.rows])
        pool[self.rows] = states


def pick(pool: Tensor, slots: Tensor, dtype: torch.dtype) -> Picked:
    """Return the states of a pool [S, HV, K, V] at slots [N], in `dtype`; slot -1 names none.

    Raises:
        ShapeError: A slot outside of the pool, or named twice, where the host reads the slots.
    """
    N, S = slots.shape[0], pool.shape[0]
    if N and S and unread(slots):
        return _pick_unread(pool, slots, dtype)
    rows = check_slots_values(slots, S)
    if N and rows[0] >= 0 and rows == list(range(rows[0], rows[0] + N)):
        # Consecutive slots are a view: no copy of any state.
        where = slice(rows[0], rows[0] + N)
        return Picked(pool[where].to(dtype), N, slice(None), where)
    keep = [i for i, row in enumerate(rows) if row >= 0]
    sequences, chosen = (
        torch.tensor(x, dtype=torch.int64, device=pool.device) for x in (keep, [rows[i] for i in keep])
    )
    return Picked(pool[chosen].to(dtype), N, sequences, chosen)


def _pick_unread(pool: Tensor, slots: Tensor, dtype: torch.dtype) -> Picked:
    """Return as many states as there are slots, whatever these are.

    Who has none stands in for the first who has one, and so writes the same bits to the same row; where nobody has one,
    what is written is what was there.
    """
    live = (slots >= 0) & (slots < pool.shape[0])
    everyone = torch.arange(slots.shape[0], device=slots.device)
    sequences = torch.where(live, everyone, live.int().argmax())
    rows = slots[sequences].long().clamp(0, pool.shape[0] - 1)
    return Picked(pool[rows].to(dtype), slots.shape[0], sequences, rows, live)
