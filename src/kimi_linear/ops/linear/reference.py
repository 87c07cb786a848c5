"""The linear layer through torch, for rows x [M, K].

    y = x weight^T + bias                                                             (1)
    dx = dy weight,   dweight = dy^T x,   dbias = sum_m dy_m                          (2)

The operands have the dtype of x.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.ops.autocast import without_autocast
from kimi_linear.ops.checks import compute_dtype
from kimi_linear.ops.linear.autograd import empty_gradients, register


@torch.library.custom_op("kimi_linear::linear_reference", mutates_args=())
def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Eq. 1."""
    with without_autocast(x.device):
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)).contiguous()


@torch.library.custom_op("kimi_linear::linear_reference_backward", mutates_args=())
def linear_reference_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 2: the gradients of x, weight and bias that are needed."""
    grad_x, grad_weight, grad_bias = empty_gradients(x, weight, bias, needed)
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, weight.shape[0])
    with without_autocast(x.device):
        if needed[0]:
            grad_x.copy_((grads @ weight.to(x.dtype)).view(x.shape))
        if needed[1]:
            grad_weight.copy_(grads.t() @ rows)
    if needed[2]:
        grad_bias.copy_(grads.to(compute_dtype(grads)).sum(0))
    return grad_x, grad_weight, grad_bias


register(linear_reference, linear_reference_backward)
