"""The routed experts in the obvious form: every expert runs every token, and a token's weight picks what counts.

    a_e = silu(w1_e x) * (w3_e x),   y_e = w2_e a_e                                          (1)
    c_e = sum_j weights_j [experts_j = e],   o = sum_e c_e y_e                               (2)

Backward, with h1 = w1_e x, h3 = w3_e x and b_e = w2_e^T do:

    dweights_j = b_e . a_e  at  e = experts_j;   dw2_e = sum_tokens c_e do a_e^T             (3)
    dh1 = c_e b_e * h3 * silu'(h1),   dh3 = c_e b_e * silu(h1)                               (4)
    dw1_e = sum dh1 x^T,  dw3_e = sum dh3 x^T,  dx = sum_e w1_e^T dh1 + w3_e^T dh3           (5)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.ops.autocast import without_autocast
from kimi_linear.ops.checks import compute_dtype
from kimi_linear.ops.moe.checks import check_experts_values


def silu_derivative(x: Tensor) -> Tensor:
    """d/dx of x sigmoid(x)."""
    sigmoid = x.sigmoid()
    return sigmoid * (1 + x * (1 - sigmoid))


def _coefficients(weights: Tensor, experts: Tensor, E: int) -> Tensor:
    """c of Eq. 2, [M, E]."""
    return weights.new_zeros(weights.shape[0], E).scatter_add(-1, experts, weights)


@torch.library.custom_op("kimi_linear::grouped_mlp_reference", mutates_args=())
def grouped_mlp_reference(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Equations 1 and 2; arguments as in `grouped_mlp`."""
    check_experts_values(experts, w1.shape[0])
    wide = compute_dtype(x)
    tokens = x.to(wide)
    c = _coefficients(weights.to(wide), experts, w1.shape[0])
    o = torch.zeros_like(tokens, memory_format=torch.contiguous_format)
    with without_autocast(x.device):
        for e in range(w1.shape[0]):
            a = F.silu(tokens @ w1[e].to(wide).mT) * (tokens @ w3[e].to(wide).mT)
            o += c[:, e, None] * (a @ w2[e].to(wide).mT)
    return o.to(x.dtype, copy=True)


@torch.library.custom_op("kimi_linear::grouped_mlp_reference_backward", mutates_args=())
def grouped_mlp_reference_backward(
    d_o: Tensor, x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, weights: Tensor, experts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Equations 3 to 5: gradients of x, w1, w3, w2 and weights."""
    wide = compute_dtype(x)
    tokens, grad = x.to(wide), d_o.to(wide)
    c = _coefficients(weights.to(wide), experts, w1.shape[0])
    d_x, d_c = torch.zeros_like(tokens), torch.zeros_like(c)
    d_w1, d_w3, d_w2 = (torch.zeros_like(w, memory_format=torch.contiguous_format) for w in (w1, w3, w2))
    with without_autocast(x.device):
        for e in range(w1.shape[0]):
            up, gate, down = (w[e].to(wide) for w in (w3, w1, w2))
            h1, h3 = tokens @ gate.mT, tokens @ up.mT
            a, b = F.silu(h1) * h3, grad @ down
            # Eq. 3
            d_c[:, e] = (b * a).sum(-1)
            d_w2[e] = (c[:, e, None] * grad).mT @ a
            # Eq. 4
            d_a = c[:, e, None] * b
            d_h1, d_h3 = d_a * h3 * silu_derivative(h1), d_a * F.silu(h1)
            # Eq. 5
            d_w1[e], d_w3[e] = d_h1.mT @ tokens, d_h3.mT @ tokens
            d_x += d_h1 @ gate + d_h3 @ up
    return d_x.to(x.dtype, copy=True), d_w1, d_w3, d_w2, d_c.gather(-1, experts).to(weights.dtype, copy=True)


@grouped_mlp_reference.register_fake
def _fake(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@grouped_mlp_reference_backward.register_fake
def _fake_backward(d_o: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in inputs[:5])


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _formula(ctx: Any, d_o: Tensor) -> tuple[Any, ...]:
    return (*grouped_mlp_reference_backward(d_o, *ctx.saved_tensors), None)


grouped_mlp_reference.register_autograd(_formula, setup_context=_save)
