"""Who holds which tokens when a sequence is cut over the ranks of a process group, as the `_cp` operators need it.

Rank r holds tokens [borders[r], borders[r + 1]) of a sequence, or of packed documents between `offsets`; cuts may fall
anywhere, and a rank may hold nothing. A document belongs to every rank from that of its first token to that of its
last. At most one document comes in from the left, a rank's first; at most one goes on to the right, its last.
"""

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from kimi_linear.base.errors import ConfigError, ShapeError
from kimi_linear.ops.checks import check_cu_seqlens_values, expect_cu_seqlens


@dataclass(frozen=True)
class ContextParallel:
    """One rank's share of a sequence that is cut over a process group; built once a step.

    Every rank calls the `_cp` operators with the same plan but for its `rank`, and its own tokens. States belong to
    documents: the caller gives the initial states of the documents in `starts`, those whose first token lies here, and
    gets the final states of the documents in `ends`. Put one after the other by rank they are those of one process. An
    empty document belongs to the rank that holds the token at its offset.

    Args:
        rank: This process.
        borders: Where each rank's tokens start, then T; one more than there are ranks.
        offsets: Where each document starts, then T; (0, T) for sequences that are not packed.
        is_packed: Whether tensors are [1, T, ..] with documents in T; otherwise each of B rows is one document.
        group: The process group. None: the default one.
        device: Where `cu_seqlens` is made. None: the default device.

    Example:
        >>> plan = ContextParallel(rank=1, borders=(0, 4, 8, 12), offsets=(0, 2, 9, 12), is_packed=True)
        >>> plan.enters, plan.leaves, plan.starts, plan.ends
        (True, True, range(2, 2), range(1, 1))
    """

    rank: int
    borders: tuple[int, ...]
    offsets: tuple[int, ...]
    is_packed: bool = False
    group: "dist.ProcessGroup | None" = None
    device: torch.device | None = None

    @classmethod
    def build(
        cls, tokens: int, *, cu_seqlens: Tensor | None = None, group: "dist.ProcessGroup | None" = None
    ) -> "ContextParallel":
        """Return this rank's plan; every rank of the group calls it, once a step.

        Args:
            tokens: How many tokens this rank holds; the ranks' tokens follow each other.
            cu_seqlens: Offsets of the documents in the whole sequence, the same on every rank, [N + 1], first 0 and
                last the sum of all ranks' tokens. None: B sequences, each cut over all ranks.
            group: The process group. Default: all processes.

        Raises:
            ConfigError: torch.distributed is not initialised, or this process is not in the group.
            ShapeError: cu_seqlens does not fit the tokens, or differs between ranks. Every rank raises it.

        Cost: one exchange of a few bytes, and a device sync where cu_seqlens is on a device.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise ConfigError(
                "context parallel: torch.distributed is not initialised, expected a process group; call "
                "torch.distributed.init_process_group first."
            )
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        if rank < 0:
            raise ConfigError("context parallel: this process is not in the group; give a group that it belongs to.")
        given = None if cu_seqlens is None else cast("list[int]", cu_seqlens.tolist())
        shares = [(0, "")] * size
        # Compared before anything is checked: an error on some ranks only would leave the others waiting.
        dist.all_gather_object(shares, (tokens, hashlib.sha256(repr(given).encode()).hexdigest()), group=group)
        other = next((r for r, share in enumerate(shares) if share[1] != shares[0][1]), None)
        if other is not None:
            raise ShapeError(
                f"context parallel: cu_seqlens differs between ranks 0 and {other}, expected the offsets of the whole "
                "sequence, the same on every rank."
            )
        borders = [0]
        for held, _ in shares:
            borders.append(borders[-1] + held)
        if cu_seqlens is None or given is None:
            return cls(rank, tuple(borders), (0, borders[-1]), group=group)
        expect_cu_seqlens("context parallel", cu_seqlens, 1, cu_seqlens.device)
        check_cu_seqlens_values(cu_seqlens, borders[-1])
        return cls(rank, tuple(borders), tuple(given), True, group, cu_seqlens.device)

    @property
    def tokens(self) -> int:
        """Tokens of this rank."""
        return self.borders[self.rank + 1] - self.borders[self.rank]

    @cached_property
    def documents(self) -> range:
        """The documents of which this rank holds a part, those that only pass it by while it is empty included."""
        every = range(len(self.offsets) - 1)
        return range(
            bisect_left(every, self.rank, key=self.last_rank), bisect_right(every, self.rank, key=self.first_rank)
        )

    @cached_property
    def enters(self) -> bool:
        """Whether the first document here began on an earlier rank."""
        return len(self.documents) > 0 and self.first_rank(self.documents[0]) < self.rank

    @cached_property
    def leaves(self) -> bool:
        """Whether the last document here goes on on a later rank."""
        return len(self.documents) > 0 and self.last_rank(self.documents[-1]) > self.rank

    @property
    def passes(self) -> bool:
        """Whether one document, and nothing else, comes from the left and goes on to the right."""
        return self.enters and self.leaves and len(self.documents) == 1

    @property
    def starts(self) -> range:
        """The documents whose first token is here: those whose initial states this rank gives."""
        return self.documents[1:] if self.enters else self.documents

    @property
    def ends(self) -> range:
        """The documents whose last token is here: those whose final states this rank gets."""
        return self.documents[:-1] if self.leaves else self.documents

    @cached_property
    def is_cut(self) -> bool:
        """Whether any document lies on several ranks. If not, nothing is exchanged."""
        return any(self.first_rank(n) < self.last_rank(n) for n in self._at_borders)

    @cached_property
    def any_passes(self) -> bool:
        """Whether any document fills a rank from border to border, coming from the left and going on to the right."""
        return any(self.first_rank(n) + 1 < self.last_rank(n) for n in self._at_borders)

    @cached_property
    def cu_seqlens(self) -> Tensor | None:
        """Offsets of this rank's documents in its own tokens, [N + 1], int32; None where sequences are not packed."""
        if not self.is_packed:
            return None
        first, last = self.borders[self.rank : self.rank + 2]
        inside = [min(max(self.offsets[n], first), last) - first for n in self.documents]
        # An operator takes at least one sequence: without any, an empty one.
        return torch.tensor([*(inside or [0]), last - first], dtype=torch.int32, device=self.device)

    @property
    def tail(self) -> int:
        """The first of this rank's tokens, counted from 0, that belongs to its last document."""
        return max(self.offsets[self.documents[-1]] - self.borders[self.rank], 0)

    @property
    def head(self) -> int:
        """How many of this rank's tokens belong to its first document."""
        return min(self.offsets[self.documents[0] + 1], self.borders[self.rank + 1]) - self.borders[self.rank]

    def first_rank(self, document: int) -> int:
        """Return the rank of a document's first token."""
        return self._holder(self.offsets[document])

    def last_rank(self, document: int) -> int:
        """Return the rank of a document's last token."""
        return self._holder(max(self.offsets[document + 1] - 1, self.offsets[document]))

    def _holder(self, token: int) -> int:
        # The last rank that starts at or before the token: one that starts there and holds nothing is passed over.
        return bisect_right(self.borders, token, hi=len(self.borders) - 1) - 1

    @property
    def _at_borders(self) -> list[int]:
        """The document at each border between two ranks, if one starts at or before it and ends behind it."""
        found = (bisect_right(self.offsets, border) - 1 for border in self.borders[1:-1])
        return [n for n in found if n < len(self.offsets) - 1]


def local_states(
    plan: ContextParallel, incoming: Tensor | None, initial_state: Tensor | None, batch: int
) -> Tensor | None:
    """Return the states before this rank's documents: the one that came from the left, then those the caller gave."""
    if incoming is None:
        if initial_state is None or len(plan.documents):
            return initial_state
        # Without documents an operator still takes one empty sequence; see `cu_seqlens`.
        return torch.cat([initial_state, initial_state.new_zeros(batch, *initial_state.shape[1:])])
    if initial_state is None:
        initial_state = incoming.new_zeros(len(plan.starts) * batch, *incoming.shape[1:])
    return torch.cat([incoming, initial_state])


def check_share(op: str, plan: ContextParallel, initial_state: Tensor | None, tensors: Sequence[Tensor | None]) -> None:
    """Raise for tensors [B, T, ..] or initial states that are not this rank's share; the first tensor is there always.

    Also for an initial state that alone needs a gradient: the ranks meet in the backward, and whether they do must not
    depend on which of them holds a state.
    """
    first = tensors[0]
    assert first is not None
    B, T = first.shape[:2]
    if plan.tokens != T:
        raise ShapeError(
            f"{op}: T is {T}, expected {plan.tokens}, the plan's tokens of rank {plan.rank}; build a plan a step."
        )
    if plan.is_packed and B != 1:
        raise ShapeError(f"{op}: B is {B} with packed documents, expected 1; concatenate them along T.")
    if initial_state is None:
        return
    rows = len(plan.starts) * B
    if initial_state.shape[0] != rows:
        raise ShapeError(
            f"{op}: initial_state holds {initial_state.shape[0]} states, expected {rows}, those of the documents that "
            f"start on rank {plan.rank} (plan.starts)."
        )
    alone = initial_state.requires_grad and not any(x is not None and x.requires_grad for x in tensors)
    if alone and torch.is_grad_enabled():
        raise ConfigError(
            f"{op}: initial_state needs a gradient and no argument with tokens does; let one need it, on every rank."
        )


def all_gather(x: Tensor, plan: ContextParallel) -> Tensor:
    """Return every rank's x, all of one shape, [P, ...]."""
    gathered = x.new_empty(len(plan.borders) - 1, *x.shape)
    dist.all_gather(list(gathered.unbind()), x.contiguous(), group=plan.group)
    return gathered
