"""The norms on the CPU: csrc/norm.cpp, one pass over memory forward and one backward. Equations as in reference.py."""

import torch
from torch import Tensor

from kimi_linear.ops import native
from kimi_linear.ops.native.library import DTYPES
from kimi_linear.ops.norm import autograd


def _rows(x: Tensor) -> Tensor:
    # [M, D], any distance from row to row, no distance within a row: a slice of the last axis is not copied.
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _known(x: Tensor) -> Tensor:
    # In a dtype the kernels read.
    return x.contiguous() if x.dtype in DTYPES else x.float().contiguous()


@torch.library.custom_op("kimi_linear::rms_norm_cpu", mutates_args=())
def rms_norm_cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return y in the dtype of x."""
    rows, known, y = _rows(x), _known(weight), x.new_empty(x.shape)
    run = native.kernel("rms_norm", "piipipiif")
    run(rows, rows.stride(0), DTYPES[x.dtype], known, DTYPES[known.dtype], y, *rows.shape, eps)
    return y


@torch.library.custom_op("kimi_linear::rms_norm_cpu_backward", mutates_args=())
def rms_norm_cpu_backward(grad_y: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight."""
    rows, grads, known = _rows(x), _rows(grad_y), _known(weight)
    grad_x, grad_weight = x.new_empty(x.shape), known.new_empty(known.shape)
    native.kernel("rms_norm_backward", "pipiipippiif")(
        *(grads, grads.stride(0), rows, rows.stride(0), DTYPES[x.dtype], known, DTYPES[known.dtype]),
        *(grad_x, grad_weight, *rows.shape, eps),
    )
    return grad_x, grad_weight.to(weight.dtype)


@torch.library.custom_op("kimi_linear::gated_rms_norm_cpu", mutates_args=())
def gated_rms_norm_cpu(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool) -> Tensor:
    """Return y in the dtype of x."""
    rows, gates, known, y = _rows(x), _rows(_known_rows(gate)), _known(weight), x.new_empty(x.shape)
    native.kernel("gated_rms_norm", "piipiipipiifi")(
        *(rows, rows.stride(0), DTYPES[x.dtype], gates, gates.stride(0), DTYPES[gates.dtype]),
        *(known, DTYPES[known.dtype], y, *rows.shape, eps, silu),
    )
    return y


def _known_rows(gate: Tensor) -> Tensor:
    return gate if gate.dtype in DTYPES else gate.float()


@torch.library.custom_op("kimi_linear::gated_rms_norm_cpu_backward", mutates_args=())
def gated_rms_norm_cpu_backward(
    grad_y: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, gate and weight."""
    rows, grads, gates, known = _rows(x), _rows(grad_y), _rows(_known_rows(gate)), _known(weight)
    grad_x, grad_weight = x.new_empty(x.shape), known.new_empty(known.shape)
    grad_gate = gates.new_empty(gate.shape)
    native.kernel("gated_rms_norm_backward", "pipiipiipipppiifi")(
        *(grads, grads.stride(0), rows, rows.stride(0), DTYPES[x.dtype], gates, gates.stride(0), DTYPES[gates.dtype]),
        *(known, DTYPES[known.dtype], grad_x, grad_gate, grad_weight, *rows.shape, eps, silu),
    )
    return grad_x, grad_gate.to(gate.dtype), grad_weight.to(weight.dtype)


@torch.library.custom_op("kimi_linear::l2_norm_cpu", mutates_args=())
def l2_norm_cpu(x: Tensor, eps: float) -> Tensor:
    """Return y in the dtype of x."""
    rows, y = _rows(x), x.new_empty(x.shape)
    native.kernel("l2_norm", "piipiif")(rows, rows.stride(0), DTYPES[x.dtype], y, *rows.shape, eps)
    return y


@torch.library.custom_op("kimi_linear::l2_norm_cpu_backward", mutates_args=())
def l2_norm_cpu_backward(grad_y: Tensor, x: Tensor, eps: float) -> Tensor:
    """Return the gradient of x."""
    rows, grads, grad_x = _rows(x), _rows(grad_y), x.new_empty(x.shape)
    native.kernel("l2_norm_backward", "pipiipiif")(
        *(grads, grads.stride(0), rows, rows.stride(0), DTYPES[x.dtype], grad_x, *rows.shape, eps)
    )
    return grad_x


autograd.register(rms_norm_cpu, rms_norm_cpu_backward)
autograd.register(gated_rms_norm_cpu, gated_rms_norm_cpu_backward)
autograd.register(l2_norm_cpu, l2_norm_cpu_backward)
