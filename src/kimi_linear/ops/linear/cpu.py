"""The linear layer natively (csrc/linear.cpp). Equations as in reference.py."""

import torch
from torch import Tensor

from kimi_linear.ops.linear.autograd import empty_gradients, register
from kimi_linear.ops.native import kernel
from kimi_linear.ops.native.library import DTYPES


def _known(tensor: Tensor) -> Tensor:
    # In a dtype and layout the kernels read.
    return tensor.contiguous() if tensor.dtype in DTYPES else tensor.float().contiguous()


@torch.library.custom_op("kimi_linear::linear_cpu", mutates_args=())
def linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Eq. 1."""
    x, weight = x.contiguous(), _known(weight)
    N, K = weight.shape
    y = x.new_empty((*x.shape[:-1], N))
    M = y.numel() // max(N, 1)
    of = DTYPES[x.dtype]
    wide = None if bias is None else bias.float().contiguous()
    kernel("linear_forward", "ppppiiiiiii")(x, weight, wide, y, M, N, K, of, of, DTYPES[weight.dtype], of)
    return y


@torch.library.custom_op("kimi_linear::linear_cpu_backward", mutates_args=())
def linear_cpu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 2: the gradients of x, weight and bias that are needed."""
    x, grad, known = x.contiguous(), grad.contiguous(), _known(weight)
    N, K = weight.shape
    M, of = grad.numel() // max(N, 1), DTYPES[x.dtype]
    grad_x, grad_weight, grad_bias = empty_gradients(x, known, bias, needed)
    if needed[0]:
        run = kernel("linear_backward_x", "pppiiiiiii")
        run(grad, known, grad_x, M, N, K, of, of, DTYPES[known.dtype], of)
    if needed[1]:
        run = kernel("linear_backward_weight", "pppiiiiiii")
        run(grad, x, grad_weight, M, N, K, of, of, of, DTYPES[known.dtype])
    if needed[2]:
        wide = grad.new_empty((N,), dtype=torch.float32)
        kernel("linear_backward_bias", "ppiii")(grad, wide, M, N, of)
        grad_bias.copy_(wide)
    return grad_x, grad_weight.to(weight.dtype), grad_bias


register(linear_cpu, linear_cpu_backward)
