"""The `triton` backend of the routed experts: its operators. Imports triton when it first runs."""

import torch
from torch import Tensor

from kimi_linear.ops.moe.checks import check_experts_values
from kimi_linear.ops.moe.experts_autograd import register
from kimi_linear.ops.registry import Call
from kimi_linear.ops.triton.backend import refuse_device


def refuse(call: Call) -> list[str]:
    """Refuse what the kernels do not compute."""
    reasons = refuse_device(call)
    if call.sizes["D"] * call.sizes["F"] >= 2**31:
        reasons.append("a matrix of an expert has 2^31 elements or more")
    return reasons


@torch.library.custom_op("kimi_linear::grouped_mlp_triton", mutates_args=())
def grouped_mlp_triton(
    x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, weights: Tensor, experts: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (o, h1, h3); h1 and h3 [M * k, F] in sorted order, empty unless `keep`."""
    from kimi_linear.ops.moe.triton import launch

    check_experts_values(experts, w1.shape[0])
    x, w1, w3, w2, weights, experts = (t.contiguous() for t in (x, w1, w3, w2, weights, experts))
    return launch.forward(x, w1, w3, w2, weights, experts, keep)


@torch.library.custom_op("kimi_linear::grouped_mlp_triton_backward", mutates_args=())
def grouped_mlp_triton_backward(
    d_o: Tensor,
    x: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    weights: Tensor,
    experts: Tensor,
    h1: Tensor,
    h3: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Equations 3 to 5: gradients of x, w1, w3, w2 and weights."""
    from kimi_linear.ops.moe.triton import launch

    d_o, x, w1, w3, w2, weights, experts = (t.contiguous() for t in (d_o, x, w1, w3, w2, weights, experts))
    return launch.backward(d_o, x, w1, w3, w2, weights, experts, h1, h3)


run = register(grouped_mlp_triton, grouped_mlp_triton_backward)
