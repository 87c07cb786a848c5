"""The gated activation natively (csrc/swiglu.cpp). Equations as in reference.py."""

import torch
from torch import Tensor

from kimi_linear.ops.native import kernel
from kimi_linear.ops.native.library import DTYPES
from kimi_linear.ops.swiglu.autograd import register


@torch.library.custom_op("kimi_linear::swiglu_cpu", mutates_args=())
def swiglu_cpu(gate: Tensor, up: Tensor) -> Tensor:
    """Eq. 1."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    kernel("swiglu_forward", "ipppi")(DTYPES[gate.dtype], gate, up, y, gate.numel())
    return y


@torch.library.custom_op("kimi_linear::swiglu_cpu_backward", mutates_args=())
def swiglu_cpu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 2: the gradients of gate and up."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    run = kernel("swiglu_backward", "ipppppi")
    run(DTYPES[gate.dtype], grad, gate, up, grad_gate, grad_up, gate.numel())
    return grad_gate, grad_up


register(swiglu_cpu, swiglu_cpu_backward)
