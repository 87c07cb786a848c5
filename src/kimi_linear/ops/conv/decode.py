"""One token a sequence through the short convolution, in place on a pool of histories addressed by slot."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.ops.checks import check_slots_values, compute_dtype
from kimi_linear.ops.registry import Call


def refuse_gradients(call: Call) -> list[str]:
    """Return why a call cannot run: an update in place cannot be differentiated."""
    return ["updates histories in place, so it has no gradient; use short_conv"] if call.needs_grad else []


def _step(x: Tensor, weight: Tensor, history: Tensor, silu: bool) -> Tensor:
    # x [n, D], weight [D, W], history [n, D, W - 1], updated in place.
    dtype, past = compute_dtype(x), history.shape[2]
    taps = weight.to(dtype)
    pre = x.to(dtype) * taps[:, past]
    for tap in range(past):
        pre.addcmul_(history[:, :, tap].to(dtype), taps[:, tap])
        history[:, :, tap] = history[:, :, tap + 1] if tap + 1 < past else x
    return (F.silu(pre, inplace=True) if silu else pre).to(x.dtype)


@torch.library.custom_op("kimi_linear::short_conv_decode_reference", mutates_args=("pool",))
def short_conv_decode_reference(x: Tensor, weight: Tensor, pool: Tensor, slots: Tensor, silu: bool) -> Tensor:
    """Return y [N, D] and move the named histories on by one token."""
    rows = check_slots_values(slots, pool.shape[0])
    n = len(rows)
    if n and rows[0] >= 0 and rows == list(range(rows[0], rows[0] + n)):
        # Consecutive slots are a view: no history is copied out and back.
        return _step(x, weight, pool[rows[0] : rows[0] + n], silu)
    y = x.new_zeros(x.shape)
    keep = [row for row, slot in enumerate(rows) if slot >= 0]
    if keep:
        picked = torch.tensor(keep, device=x.device)
        where = torch.tensor([rows[row] for row in keep], device=x.device)
        history = pool.index_select(0, where)
        y.index_copy_(0, picked, _step(x.index_select(0, picked), weight, history, silu))
        pool.index_copy_(0, where, history)
    return y


@short_conv_decode_reference.register_fake
def _(x: Tensor, weight: Tensor, pool: Tensor, slots: Tensor, silu: bool) -> Tensor:
    return x.new_empty(x.shape)
