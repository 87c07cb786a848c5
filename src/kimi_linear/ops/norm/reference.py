"""RMSNorm, gated RMSNorm and L2 norm with their gradients, one row at a time over the last axis of size V.

    r = (mean(x^2) + eps)^(-1/2)                                                      (1)
    n = r x                                                                           (2)
    rms_norm:        y = weight * cast(n)                                             (3)
    gated_rms_norm:  y = cast(weight * n * act(gate)),  act = sigmoid or silu         (4)
    l2_norm:         y = cast(r x),  r = (sum(x^2) + eps)^(-1/2)                      (5)

The backward keeps the inputs alone and computes r again: one more pass over x for no saved memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.ops.checks import compute_dtype
from kimi_linear.ops.norm import autograd


def _normalise(x: Tensor, eps: float, terms: int) -> tuple[Tensor, Tensor]:
    # Eqs. 1, 2 and 5, with the sum of squares over `terms`: r x [..., V] and r [..., 1] in the compute dtype.
    wide = x.to(compute_dtype(x))
    r = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(terms).add_(eps).rsqrt_()
    return wide * r, r


def _normalise_backward(grad_n: Tensor, n: Tensor, r: Tensor, terms: int) -> Tensor:
    # dx = r (dn - n (dn . n) / terms); overwrites grad_n.
    # Not vecdot: that is a matrix product, which a caller's autocast would run in half precision.
    along = (grad_n * n).sum(-1, keepdim=True).div_(terms)
    return grad_n.addcmul_(n, along, value=-1).mul_(r)


def _sum_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).sum(0)


@torch.library.custom_op("kimi_linear::rms_norm_reference", mutates_args=())
def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return y in the dtype of x."""
    n, _ = _normalise(x, eps, x.shape[-1])
    # Eq. 3.
    return (weight * n.to(x.dtype)).to(x.dtype).contiguous()


@torch.library.custom_op("kimi_linear::rms_norm_reference_backward", mutates_args=())
def rms_norm_reference_backward(grad_y: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight; the cast of Eq. 3 passes gradients unchanged."""
    n, r = _normalise(x, eps, x.shape[-1])
    wide = grad_y.to(n.dtype)
    grad_weight = _sum_rows(wide * n.to(x.dtype))
    grad_x = _normalise_backward(wide * weight.to(n.dtype), n, r, x.shape[-1])
    return grad_x.to(x.dtype).contiguous(), grad_weight.to(weight.dtype)


@torch.library.custom_op("kimi_linear::gated_rms_norm_reference", mutates_args=())
def gated_rms_norm_reference(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool) -> Tensor:
    """Return y in the dtype of x."""
    n, _ = _normalise(x, eps, x.shape[-1])
    wide = gate.to(n.dtype)
    # Eq. 4.
    y = n.mul_(weight.to(n.dtype)).mul_(F.silu(wide) if silu else wide.sigmoid())
    return y.to(x.dtype).contiguous()


@torch.library.custom_op("kimi_linear::gated_rms_norm_reference_backward", mutates_args=())
def gated_rms_norm_reference_backward(
    grad_y: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, gate and weight."""
    n, r = _normalise(x, eps, x.shape[-1])
    wide_gate, wide_weight, wide_grad = (t.to(n.dtype) for t in (gate, weight, grad_y))
    act = F.silu(wide_gate) if silu else wide_gate.sigmoid()
    grad_n = wide_grad * act
    grad_weight = _sum_rows(grad_n * n)
    grad_n.mul_(wide_weight)
    # d act: sigmoid and silu both have a one-pass derivative in torch.
    grad_act = (wide_grad * n).mul_(wide_weight)
    if silu:
        grad_gate = torch.ops.aten.silu_backward(grad_act, wide_gate)
    else:
        grad_gate = torch.ops.aten.sigmoid_backward(grad_act, act)
    grad_x = _normalise_backward(grad_n, n, r, x.shape[-1])
    grads = (grad_x.to(x.dtype), grad_gate.to(gate.dtype), grad_weight.to(weight.dtype))
    return grads[0].contiguous(), grads[1].contiguous(), grads[2]


@torch.library.custom_op("kimi_linear::l2_norm_reference", mutates_args=())
def l2_norm_reference(x: Tensor, eps: float) -> Tensor:
    """Return y in the dtype of x."""
    y, _ = _normalise(x, eps, terms=1)
    return y.to(x.dtype).contiguous()


@torch.library.custom_op("kimi_linear::l2_norm_reference_backward", mutates_args=())
def l2_norm_reference_backward(grad_y: Tensor, x: Tensor, eps: float) -> Tensor:
    """Return the gradient of x."""
    y, r = _normalise(x, eps, terms=1)
    grad_y = grad_y.to(y.dtype, copy=True)
    return _normalise_backward(grad_y, y, r, terms=1).to(x.dtype).contiguous()


autograd.register(rms_norm_reference, rms_norm_reference_backward)
autograd.register(gated_rms_norm_reference, gated_rms_norm_reference_backward)
autograd.register(l2_norm_reference, l2_norm_reference_backward)
