"""The short convolution of a sequence cut over ranks: the last inputs of each rank's last document travel right.

Where a rank holds fewer than W - 1 tokens of a document, the ranks before it fill up.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kimi_linear.ops.checks import compute_dtype, expect_shape
from kimi_linear.ops.context_parallel import ContextParallel, all_gather, check_share, local_states
from kimi_linear.ops.conv.api import Activation, short_conv


def short_conv_cp(
    plan: ContextParallel,
    x: Tensor,
    weight: Tensor,
    *,
    initial_state: Tensor | None = None,
    activation: Activation | None = "silu",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply `short_conv` to a sequence that is cut over the ranks of a process group.

    Args:
        plan: Who holds which tokens; packed documents are the plan's.
        x: This rank's inputs, [B, T, D].
        weight: Taps, [D, W] or [D, 1, W], the same on every rank. Its gradient is this rank's share: sum over ranks.
        initial_state: Of the documents that start here (`plan.starts`), [.., D, W - 1]. Default: zeros.
        activation, backend: As for `short_conv`.

    Returns:
        y [B, T, D], and the last W - 1 inputs of the documents that end here (`plan.ends`), [.., D, W - 1].

    Raises:
        ShapeError, ConfigError: The plan, or the initial state, does not fit.
        ShapeError, DtypeError, DeviceError, BackendError: As for `short_conv`.

    Every rank calls it, forward and backward, in the same order: ranks wait for each other.

    Numerics: inputs travel as they are; their gradients are summed in float32, but those of the W - 1 tokens before a
        border are rounded to the dtype of x twice.
    Cost: where any document is cut, P B D (W - 1) elements received forward, P ranks, and backward the sum over the
        ranks of as many float32 gradients; nothing otherwise.

    Example:
        >>> import torch
        >>> from kimi_linear.ops import ContextParallel
        >>> plan = ContextParallel(rank=0, borders=(0, 5), offsets=(0, 5))
        >>> y, state = short_conv_cp(plan, torch.randn(2, 5, 8), torch.randn(8, 4))
        >>> y.shape, state.shape
        (torch.Size([2, 5, 8]), torch.Size([2, 8, 3]))
    """
    op, past = "short_conv_cp", weight.shape[-1] - 1
    expect_shape(op, "x", x, (None, None, None), "B, T, D")
    if initial_state is not None:
        expect_shape(op, "initial_state", initial_state, (None, x.shape[2], past), "N, D, W - 1")
    check_share(op, plan, initial_state, [x])
    incoming = None
    if plan.is_cut:
        x, incoming = _receive(plan, x, initial_state, past)
    state = local_states(plan, incoming, initial_state, x.shape[0])
    y, final = short_conv(
        x, weight, initial_state=state, cu_seqlens=plan.cu_seqlens, activation=activation, backend=backend
    )
    return y, final[: len(plan.ends) * x.shape[0]]


@torch.compiler.disable
def _receive(plan: ContextParallel, x: Tensor, initial_state: Tensor | None, past: int) -> tuple[Tensor, Tensor | None]:
    """Return x, now tied to the exchange, and the inputs before it [B, D, W - 1] if a document comes from the left."""
    B, _, D = x.shape
    tail = x.new_zeros(B, D, past)
    if plan.leaves:
        if initial_state is not None and not plan.passes:
            tail = initial_state[-B:].to(x.dtype)
        tail = torch.cat([tail, x[:, max(plan.tail, x.shape[1] - past) :].transpose(1, 2)], -1)[..., -past:]
    x, tails = _Exchange.apply(plan, x, tail)
    if not plan.enters:
        return x, None
    document = plan.documents[0]
    first = plan.first_rank(document)
    # Between the document's first rank and this one it fills every rank.
    held = [tails[r, ..., max(past - plan.borders[r + 1] + plan.borders[r], 0) :] for r in range(first + 1, plan.rank)]
    return x, torch.cat([tails[first], *held], -1)[..., -past:]


class _Exchange(torch.autograd.Function):
    """Gather a small tensor from every rank. x only passes through: so every rank's backward comes by, used or not."""

    @staticmethod
    def forward(ctx: Any, plan: ContextParallel, x: Tensor, mine: Tensor) -> tuple[Tensor, Tensor]:
        ctx.plan = plan
        return x.view_as(x), all_gather(mine, plan)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor, d_gathered: Tensor) -> tuple[None, Tensor, Tensor]:
        total = d_gathered.to(compute_dtype(d_gathered), copy=True)
        dist.all_reduce(total, group=ctx.plan.group)
        return None, d_x, total[ctx.plan.rank].to(d_gathered.dtype)
