"""The delta rule of a sequence cut over ranks: a rank's tokens map the state before them to the state behind them.

    S_out = M S_in + B       S_in of rank r  = B_{r-1} + M_{r-1} (B_{r-2} + ...), back to the document's start
    dS_in = M^T dS_out + E   dS_out of rank r = E_{r+1} + M_{r+1}^T (E_{r+2} + ...), up to the document's end

B is the state behind the tokens when they start from zero, M [K, K] what they make of the identity when nothing is
written; both come from the operator itself, run on K more value columns. Only a rank that one document fills from
border to border needs M. E is the gradient of the state before the tokens when nothing comes from the right. With S_in
and dS_out at hand a rank's run is the plain operator's, forward and backward; M and B need no gradient of their own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.ops.autocast import without_autocast
from kimi_linear.ops.checks import expect_shape
from kimi_linear.ops.context_parallel import ContextParallel, all_gather, check_share, local_states
from kimi_linear.ops.delta_rule.api import Read, check_state_dtype, delta_rule
from kimi_linear.ops.delta_rule.core import kda_core
from kimi_linear.ops.delta_rule.fronts import gated_delta_rule, kda
from kimi_linear.ops.delta_rule.layout import wide_dtype

# So many leading tensors of every front have a token axis, [B, T, ..]; what follows are parameters.
WITH_TOKENS = 5


def delta_rule_cp(
    plan: ContextParallel,
    q: Tensor,
    k: Tensor,
    erase_key: Tensor | None,
    write_value: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    read: Read = "post",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply `delta_rule` to a sequence that is cut over the ranks of a process group.

    Args:
        plan: Who holds which tokens; packed documents are the plan's.
        q, k, erase_key, write_value, log_decay: This rank's tokens, as for `delta_rule`.
        scale, read, backend: As for `delta_rule`, the same on every rank.
        initial_state: Of the documents that start here (`plan.starts`), [.., HV, K, V]. Default: zeros.

    Returns:
        Output [B, T, HV, V], and the final states of the documents that end here (`plan.ends`), [.., HV, K, V].

    Raises:
        ShapeError, ConfigError: The plan, or the initial state, does not fit.
        ShapeError, DtypeError, DeviceError, BackendError: As for `delta_rule`.

    Every rank calls it, forward and backward, in the same order: ranks wait for each other. Gradients are whole, but
    those of parameters (`kda_core_cp`), which are sums over tokens, are this rank's share: sum them over the ranks.

    Numerics: states are exchanged and composed in float32 (float64 for float64 inputs). Where no document is cut,
        nothing is exchanged and results are those of `delta_rule`, bit for bit.
    Cost: received, whatever T, P B HV K (K + V) float32 forward and as many backward, P ranks; without the K K part if
        no document fills a rank from border to border. Computed beside the operator's own run, on a rank that one
        document fills: a run on K + V value columns and, for the backward, one forward and one backward more; on a rank
        with one document coming in and another going on: a run over the latter, and one forward and one backward more
        over the former; on all others nothing. Kept for the backward beside what the operator keeps: M, B HV K K
        elements, on a rank that one document fills.

    Example:
        >>> import torch
        >>> from kimi_linear.ops import ContextParallel
        >>> plan = ContextParallel(rank=0, borders=(0, 5), offsets=(0, 5))
        >>> k = torch.nn.functional.normalize(torch.randn(1, 5, 2, 8), dim=-1)
        >>> o, state = delta_rule_cp(plan, k, k, 0.5 * k, torch.randn(1, 5, 2, 4), -torch.rand(1, 5, 2, 8))
        >>> o.shape, state.shape
        (torch.Size([1, 5, 2, 4]), torch.Size([1, 2, 8, 4]))
    """
    run = partial(delta_rule, scale=scale, read=read, backend=backend)
    return _link("delta_rule_cp", run, 3, plan, initial_state, (q, k, erase_key, write_value, log_decay))


def kda_cp(
    plan: ContextParallel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply `kda` to a sequence that is cut over the ranks of a process group; otherwise as `delta_rule_cp`.

    Example:
        >>> import torch
        >>> from kimi_linear.ops import ContextParallel
        >>> plan = ContextParallel(rank=0, borders=(0, 5), offsets=(0, 5))
        >>> k, beta = torch.nn.functional.normalize(torch.randn(1, 5, 2, 8), dim=-1), torch.rand(1, 5, 2)
        >>> o, state = kda_cp(plan, k, k, torch.randn(1, 5, 2, 8), -torch.rand(1, 5, 2, 8), beta)
        >>> o.shape
        torch.Size([1, 5, 2, 8])
    """
    run = partial(kda, scale=scale, backend=backend)
    return _link("kda_cp", run, 2, plan, initial_state, (q, k, v, log_decay, beta))


def gated_delta_rule_cp(
    plan: ContextParallel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply `gated_delta_rule` to a sequence cut over the ranks of a process group; otherwise as `delta_rule_cp`.

    Example:
        >>> import torch
        >>> from kimi_linear.ops import ContextParallel
        >>> plan = ContextParallel(rank=0, borders=(0, 5), offsets=(0, 5))
        >>> k, beta = torch.nn.functional.normalize(torch.randn(1, 5, 2, 8), dim=-1), torch.rand(1, 5, 2)
        >>> o, state = gated_delta_rule_cp(plan, k, k, torch.randn(1, 5, 2, 8), -torch.rand(1, 5, 2), beta)
        >>> o.shape
        torch.Size([1, 5, 2, 8])
    """
    run = partial(gated_delta_rule, scale=scale, backend=backend)
    return _link("gated_delta_rule_cp", run, 2, plan, initial_state, (q, k, v, log_decay, beta))


def kda_core_cp(
    plan: ContextParallel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    *,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply `kda_core` to a sequence that is cut over the ranks of a process group; otherwise as `delta_rule_cp`.

    The gradients of A_log and dt_bias are this rank's share.

    Example:
        >>> import torch
        >>> from kimi_linear.ops import ContextParallel
        >>> plan = ContextParallel(rank=0, borders=(0, 5), offsets=(0, 5))
        >>> q, k, v, gate = (torch.randn(1, 5, 2, 8) for _ in range(4))
        >>> o, state = kda_core_cp(plan, q, k, v, gate, torch.randn(1, 5, 2), torch.zeros(2), torch.zeros(16))
        >>> o.shape
        torch.Size([1, 5, 2, 8])
    """
    run = partial(kda_core, lower_bound=lower_bound, allow_neg_eigval=allow_neg_eigval, scale=scale, backend=backend)
    return _link("kda_core_cp", run, 2, plan, initial_state, (q, k, v, gate, beta, A_log, dt_bias))


# The operator's tensors in order, None for those that are not given.
Tensors = Sequence[Any]
# B, HV, K, V
Sizes = tuple[int, int, int, int]


@dataclass(frozen=True)
class _Local:
    """The plain operator, which of its tensors holds the values, and this rank's share of the tokens."""

    run: Callable[..., tuple[Tensor, Tensor]]
    value: int
    plan: ContextParallel

    def sizes(self, tensors: Tensors) -> Sizes:
        """Return B, HV, K, V."""
        q, v = tensors[0], tensors[self.value]
        return q.shape[0], v.shape[2], q.shape[3], v.shape[3]

    def sequences(self, tensors: Tensors, incoming: Tensor | None, initial_state: Tensor | None) -> tuple[Tensor, ...]:
        """Run all tokens; return o, the states of the documents that end here, and that of the one that goes on."""
        batch = tensors[0].shape[0]
        state = local_states(self.plan, incoming, initial_state, batch)
        o, final = self.run(*tensors, initial_state=state, cu_seqlens=self.plan.cu_seqlens)
        ends = len(self.plan.ends) * batch
        return o, *final.split([ends, final.shape[0] - ends])

    @torch.no_grad()
    def effect(self, tensors: Tensors, initial_state: Tensor | None) -> Tensor:
        """Return [M | B] of a document that passes this rank, or the state behind the last one, which starts here."""
        B, HV, K, V = self.sizes(tensors)
        tokens: list[Any] = [None if x is None else x[:, self.plan.tail :] for x in tensors[:WITH_TOKENS]]
        state = None if initial_state is None else initial_state[-B:]
        if self.plan.passes:
            value = tokens[self.value]
            tokens[self.value] = F.pad(value, (K, 0))
            identity = torch.eye(K, K + V, dtype=wide_dtype(value.dtype), device=value.device)
            state = identity.expand(B, HV, K, K + V).contiguous()
        return self.run(*tokens, *tensors[WITH_TOKENS:], initial_state=state, cu_seqlens=None)[1]

    def pull(self, tensors: Tensors, incoming: Tensor, d_o: Tensor, d_ends: Tensor) -> Tensor:
        """Return E: the gradient of the state that came from the left when nothing comes from the right."""
        head, state = self.plan.head, incoming.detach().requires_grad_()
        tokens = [None if x is None else x[:, :head] for x in tensors[:WITH_TOKENS]]
        with torch.enable_grad():
            o, final = self.run(*tokens, *tensors[WITH_TOKENS:], initial_state=state, cu_seqlens=None)
        d_final = torch.zeros_like(final) if self.plan.passes else d_ends[: final.shape[0]]
        return torch.autograd.grad([o, final], state, [d_o[:, :head], d_final])[0]

    def send(self, sizes: Sizes, like: Tensor, *, state: Tensor | None, transition: Tensor | None) -> Tensor:
        """Gather [M | B], or [M | E], of all ranks, zeros for what a rank has none of; no M where no rank has any."""
        B, HV, K, V = sizes
        columns = K if self.plan.any_passes else 0
        mine = like.new_zeros(B, HV, K, columns + V, dtype=wide_dtype(like.dtype))
        if state is not None:
            mine[..., columns:] = state
        if transition is not None:
            mine[..., :columns] = transition
        return all_gather(mine, self.plan)


@torch.compiler.disable
def _link(
    op: str,
    run: Callable[..., tuple[Tensor, Tensor]],
    value: int,
    plan: ContextParallel,
    initial_state: Tensor | None,
    tensors: Tensors,
) -> tuple[Tensor, Tensor]:
    """Run an operator on this rank's tokens, linked to the other ranks where a document is cut."""
    q, v = tensors[0], tensors[value]
    expect_shape(op, "q", q, (None, None, None, None), "B, T, H, K")
    expect_shape(op, "the value", v, (*q.shape[:2], None, None), "B, T, HV, V")
    if initial_state is not None:
        expect_shape(op, "initial_state", initial_state, (None, v.shape[2], q.shape[3], v.shape[3]), "N, HV, K, V")
        check_state_dtype(op, "initial_state", initial_state, v)
    check_share(op, plan, initial_state, tensors[:WITH_TOKENS])
    local = _Local(run, value, plan)
    sizes = local.sizes(tensors)
    incoming = transition = None
    if plan.enters:
        state = local.effect(tensors, initial_state) if plan.leaves else None
        if plan.passes and state is not None:
            # A copy, so that what is kept for the backward does not keep B.
            transition, state = state[..., : sizes[2]].clone(), state[..., sizes[2] :]
        gathered = local.send(sizes, v, state=state, transition=transition)
        first = plan.first_rank(plan.documents[0])
        incoming = _compose(gathered, range(first, plan.rank), sizes, adjoint=False)
        incoming, *tensors = _Enter.apply(local, incoming, *tensors)
    o, ends, right = local.sequences(tensors, incoming, initial_state)
    if not plan.is_cut:
        return o, ends
    if not plan.enters:
        # What goes on is the run's own: there was nothing to wait for.
        local.send(sizes, v, state=right.detach() if plan.leaves else None, transition=None)
    held = (transition, incoming, *tensors) if plan.enters and plan.leaves else ()
    return _Leave.apply(local, o, ends, right, *(None if x is None else x.detach() for x in held))


def _compose(gathered: Tensor, ranks: range, sizes: Sizes, *, adjoint: bool) -> Tensor:
    """Carry a state through ranks that sent [M | B], or a gradient through [M | E]; the first rank's M has no part."""
    _, _, K, V = sizes
    state = gathered[ranks[0], ..., -V:].clone()
    with torch.no_grad(), without_autocast(gathered.device):
        for rank in ranks[1:]:
            M = gathered[rank, ..., :K]
            state = (M.mT if adjoint else M) @ state + gathered[rank, ..., -V:]
    return state


class _Enter(torch.autograd.Function):
    """Pass on the state that came from the left, and all tensors, so that a backward to any of them comes by."""

    @staticmethod
    def forward(ctx: Any, local: _Local, incoming: Tensor, *tensors: Any) -> tuple[Any, ...]:
        ctx.set_materialize_grads(False)
        ctx.local, ctx.sizes = local, local.sizes(tensors)
        return incoming.view_as(incoming), *(None if x is None else x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, d_incoming: Tensor, *grads: Any) -> tuple[Any, ...]:
        if not ctx.local.plan.leaves:
            # E is what the operator's own backward gave. Where a document goes on, `_Leave` had to send it before that.
            ctx.local.send(ctx.sizes, d_incoming, state=d_incoming, transition=None)
        return None, None, *grads


class _Leave(torch.autograd.Function):
    """Pass on the results; backward, get the gradient of the state that went on to the right.

    `held` is M, the state that came from the left and the tensors, on a rank that documents both enter and leave.
    """

    @staticmethod
    def forward(ctx: Any, local: _Local, o: Tensor, ends: Tensor, right: Tensor, *held: Any) -> tuple[Tensor, Tensor]:
        # At least one tensor on every rank: recomputation of activations stops at the last tensor saved, which must lie
        # behind the exchange.
        ctx.save_for_backward(o.new_empty(0), *held)
        ctx.local, ctx.sizes = local, (o.shape[0], o.shape[2], right.shape[2], o.shape[3])
        return o.view_as(o), ends.view_as(ends)

    @staticmethod
    def backward(ctx: Any, d_o: Tensor, d_ends: Tensor) -> tuple[Any, ...]:
        local, plan, d_right = ctx.local, ctx.local.plan, None
        # Before the exchange: here activations are recomputed, with the exchanges of the forward.
        _, *held = ctx.saved_tensors
        if plan.leaves or not plan.enters:
            transition, E = None, None
            if held:
                transition, incoming, *tensors = held
                E = local.pull(tuple(tensors), incoming, d_o, d_ends)
            gathered = local.send(ctx.sizes, d_ends, state=E, transition=transition)
            if plan.leaves:
                last = plan.last_rank(plan.documents[-1])
                d_right = _compose(gathered, range(last, plan.rank, -1), ctx.sizes, adjoint=True)
        return None, d_o, d_ends, d_right, *(None for _ in held)
