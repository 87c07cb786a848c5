"""The short convolution written from its equation: one gather and one multiply-add a tap, over whole segments.

u      = [history; x] of every sequence                                           (1)
pre_t  = sum_j weight[:, j] * u_{t - (W - 1) + j}                                 (2)
y_t    = silu(pre_t), or pre_t                                                    (3)
final  = the last W - 1 rows of u                                                 (4)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.ops.checks import compute_dtype
from kimi_linear.ops.conv import autograd
from kimi_linear.ops.conv.layout import Layout, rows_to_state, segments, state_to_rows


def _segment_rows(x: Tensor, initial_state: Tensor | None, layout: Layout) -> Tensor:
    # Eq. 1, [R, D].
    u = x.new_zeros(layout.rows, x.shape[2], dtype=compute_dtype(x))
    u[layout.tokens] = x.flatten(0, 1).to(u.dtype)
    if initial_state is not None:
        u[layout.history] = state_to_rows(initial_state).to(u.dtype)
    return u


def _tap(layout: Layout, tap: int) -> Tensor:
    return layout.tokens - (layout.width - 1) + tap


def _correlate(u: Tensor, weight: Tensor, layout: Layout) -> Tensor:
    # Eq. 2, [B * T, D].
    pre = u.new_zeros(layout.tokens.shape[0], u.shape[1])
    for tap in range(layout.width):
        pre += weight[:, tap].to(u.dtype) * u[_tap(layout, tap)]
    return pre


def _layout(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None) -> Layout:
    return segments(x.shape[0], x.shape[1], cu_seqlens, weight.shape[1], x.device)


@torch.library.custom_op("kimi_linear::short_conv_reference", mutates_args=())
def short_conv_reference(
    x: Tensor, weight: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """Return y [B, T, D] and the final state [N, D, W - 1]."""
    layout = _layout(x, weight, cu_seqlens)
    u = _segment_rows(x, initial_state, layout)
    pre = _correlate(u, weight, layout)
    # Eq. 3.
    y = F.silu(pre) if silu else pre
    # Eq. 4.
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return y.to(x.dtype).view(x.shape), rows_to_state(u[layout.final].to(x.dtype), sequences, layout)


@torch.library.custom_op("kimi_linear::short_conv_reference_backward", mutates_args=())
def short_conv_reference_backward(
    grad_y: Tensor,
    grad_final: Tensor,
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and initial_state; the pre-activation is computed again."""
    layout = _layout(x, weight, cu_seqlens)
    u = _segment_rows(x, initial_state, layout)
    grad_pre = grad_y.flatten(0, 1).to(u.dtype)
    if silu:
        # Eq. 3: silu'(z) = s + z s (1 - s), s = sigmoid(z).
        pre = _correlate(u, weight, layout)
        s = pre.sigmoid()
        grad_pre = grad_pre * (s + pre * s * (1 - s))
    # Eq. 4, then Eq. 2 by the product rule; a tap's rows are distinct, so += adds each once.
    grad_u = torch.zeros_like(u)
    grad_u[layout.final] = state_to_rows(grad_final).to(u.dtype)
    grad_weight = u.new_empty(weight.shape)
    for tap in range(layout.width):
        rows = _tap(layout, tap)
        grad_u[rows] += weight[:, tap].to(u.dtype) * grad_pre
        grad_weight[:, tap] = (grad_pre * u[rows]).sum(0)
    # Eq. 1.
    grad_x = grad_u[layout.tokens].to(x.dtype).view(x.shape)
    if initial_state is None:
        return grad_x, grad_weight.to(weight.dtype), x.new_empty(0)
    grad_state = rows_to_state(grad_u[layout.history].to(initial_state.dtype), initial_state.shape[0], layout)
    return grad_x, grad_weight.to(weight.dtype), grad_state


autograd.register(short_conv_reference, short_conv_reference_backward)
