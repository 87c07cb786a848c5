"""The forget gate in both parameterisations, with its gradients. u and g are [M, HV, K]; a = exp(A_log), per head.

    u = x + dt_bias                                                                   (1)
    softplus:  g = -a softplus(u)                                                     (2)
    bounded:   g = lower_bound sigmoid(a u)                                           (3)

The backward keeps the inputs alone. Sums over tokens and channels run in the compute dtype in a fixed order.
"""

import torch
from torch import Tensor

from kimi_linear.ops.checks import compute_dtype
from kimi_linear.ops.gate import autograd


def _shifted(x: Tensor, A_log: Tensor | None, dt_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    # u [M, HV, K] (a fresh tensor) and a [HV, 1], or [1, 1] when there is no A_log.
    dtype = compute_dtype(x)
    # Eq. 1.
    u = x.to(dtype, copy=True) if dt_bias is None else x.to(dtype) + dt_bias.to(dtype).view(x.shape[1:])
    a = u.new_ones(1, 1) if A_log is None else A_log.to(dtype).exp().unsqueeze(-1)
    return u, a


def _softplus(u: Tensor) -> Tensor:
    # log(1 + e^u) without overflow; exact to rounding at both ends, so no threshold is needed.
    return u.clamp(min=0).add_(u.abs().neg_().exp_().log1p_())


@torch.library.custom_op("kimi_linear::forget_gate_reference", mutates_args=())
def forget_gate_reference(x: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None) -> Tensor:
    """Return log_decay [M, HV, K] in the compute dtype."""
    u, a = _shifted(x, A_log, dt_bias)
    if lower_bound is None:
        # Eq. 2.
        return _softplus(u).mul_(a).neg_()
    # Eq. 3.
    return u.mul_(a).sigmoid_().mul_(lower_bound)


@torch.library.custom_op("kimi_linear::forget_gate_reference_backward", mutates_args=())
def forget_gate_reference_backward(
    grad: Tensor, x: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, A_log and dt_bias (empty where there is none)."""
    u, a = _shifted(x, A_log, dt_bias)
    grad = grad.to(u.dtype)
    if lower_bound is None:
        # Eq. 2: dx = -a sigmoid(u) dg, dA_log = sum dg g.
        grad_x = u.sigmoid().mul_(grad).mul_(-a)
        grad_log = (_softplus(u) * grad).sum((0, 2)).mul_(-a.squeeze(-1))
    else:
        # Eq. 3: dx = a lower_bound s (1 - s) dg, dA_log = sum dx u.
        grad_x = torch.ops.aten.sigmoid_backward(grad * lower_bound, (u * a).sigmoid_()).mul_(a)
        grad_log = (grad_x * u).sum((0, 2))
    none = x.new_empty(0)
    return (
        grad_x.to(x.dtype).contiguous(),
        none if A_log is None else grad_log.to(A_log.dtype),
        none.clone() if dt_bias is None else grad_x.sum(0).flatten().to(dt_bias.dtype),
    )


autograd.register(forget_gate_reference, forget_gate_reference_backward)
