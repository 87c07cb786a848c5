"""The `triton` backend of the gated activation. Imports triton when it first runs."""

import torch
from torch import Tensor

from kimi_linear.ops.swiglu.autograd import register

# Elements of a program.
BLOCK = 1024


def _launch(kernel: str, *tensors: Tensor) -> None:
    from kimi_linear.ops.swiglu.triton import kernels
    from kimi_linear.ops.triton.launch import start

    size = tensors[0].numel()
    start(getattr(kernels, kernel), -(-size // BLOCK), *tensors, size, BLOCK=BLOCK, num_warps=4)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """Eq. 1, one launch."""
    y = _like(gate)
    _launch("forward_kernel", gate.contiguous(), up.contiguous(), y)
    return y


def backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 2, one launch."""
    grad_gate, grad_up = _like(gate), _like(up)
    _launch("backward_kernel", grad.contiguous(), gate.contiguous(), up.contiguous(), grad_gate, grad_up)
    return grad_gate, grad_up


@torch.library.custom_op("kimi_linear::swiglu_triton", mutates_args=())
def swiglu_triton(gate: Tensor, up: Tensor) -> Tensor:
    """Return y, Eq. 1."""
    return forward(gate, up)


@torch.library.custom_op("kimi_linear::swiglu_triton_backward", mutates_args=())
def swiglu_triton_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up, Eq. 2."""
    return backward(grad, gate, up)


register(swiglu_triton, swiglu_triton_backward)
