"""Routing natively (csrc/moe_route.cpp): a pass over each token's logits. Equations as numbered in router.py."""

import torch
from torch import Tensor

from kimi_linear.ops.moe.router_autograd import register
from kimi_linear.ops.native import kernel
from kimi_linear.ops.native.library import DTYPES


@torch.library.custom_op("kimi_linear::moe_route_cpu", mutates_args=())
def moe_route_cpu(
    logits: Tensor, bias: Tensor, top_k: int, renormalize: bool, scaling: float, activation: str
) -> tuple[Tensor, Tensor]:
    """Equations 1 to 3; arguments as in `route`, bias float32."""
    logits, bias = logits.contiguous(), bias.contiguous()
    M, E = logits.shape
    weights = logits.new_empty(M, top_k, dtype=torch.float32)
    experts = logits.new_empty(M, top_k, dtype=torch.int64)
    kernel("moe_route", "ippiiiifipp")(
        *(DTYPES[logits.dtype], logits, bias, M, E, top_k),
        *(renormalize, scaling, activation == "softmax", weights, experts),
    )
    return weights, experts


@torch.library.custom_op("kimi_linear::moe_route_cpu_backward", mutates_args=())
def moe_route_cpu_backward(
    d_weights: Tensor, logits: Tensor, experts: Tensor, renormalize: bool, scaling: float, activation: str
) -> Tensor:
    """Equations 4 and 5."""
    d_weights, logits, experts = d_weights.contiguous(), logits.contiguous(), experts.contiguous()
    d_logits = torch.empty_like(logits)
    kernel("moe_route_backward", "ipppiiiifip")(
        *(DTYPES[logits.dtype], d_weights, logits, experts, *logits.shape, experts.shape[1]),
        *(renormalize, scaling, activation == "softmax", d_logits),
    )
    return d_logits


register(moe_route_cpu, moe_route_cpu_backward)


def run(
    logits: Tensor, bias: Tensor, top_k: int, renormalize: bool, scaling: float, activation: str
) -> tuple[Tensor, Tensor]:
    """Run the op."""
    weights, experts = moe_route_cpu(logits, bias.float(), top_k, renormalize, scaling, activation)
    return weights, experts
