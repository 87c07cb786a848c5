"""The routed experts natively (csrc/moe_forward.cpp, csrc/moe_backward.cpp). Equations as numbered in reference.py.

Under autocast the products are in bfloat16 while x and the matrices stay as they are, float32 usually: what is rounded
is what goes into a product, while it is packed for it. Gradients come back in the dtype of what they belong to.

Kept for the backward: h1 and h3 side by side, 2 * M * k * F elements of the products' dtype.
"""

from typing import Any

import torch
from torch import Tensor

from kimi_linear.ops.autocast import autocast_dtype
from kimi_linear.ops.moe.checks import wrong_expert
from kimi_linear.ops.native import kernel
from kimi_linear.ops.native.library import DTYPES

_FORWARD, _BACKWARD = "iiii" + "p" * 10 + "i" * 5, "iiii" + "p" * 14 + "i" * 5


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.contiguous() for t in tensors)


def _types(low: bool, x: Tensor, w: Tensor, weights: Tensor) -> tuple[int, int, int, int]:
    return int(low), DTYPES[x.dtype], DTYPES[w.dtype], DTYPES[weights.dtype]


def _sizes(x: Tensor, w1: Tensor, weights: Tensor) -> tuple[int, int, int, int, int]:
    (M, D), (E, width, _) = x.shape, w1.shape
    return M, weights.shape[1], E, D, width


def _sums(x: Tensor, dtype: torch.dtype) -> Tensor | None:
    # A float32 result is summed where it stands.
    return x.new_empty(x.shape, dtype=torch.float32) if dtype == torch.bfloat16 else None


@torch.library.custom_op("kimi_linear::grouped_mlp_cpu", mutates_args=())
def grouped_mlp_cpu(
    x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, weights: Tensor, experts: Tensor, keep: bool, low: bool
) -> tuple[Tensor, Tensor]:
    """Return (o, h), in bfloat16 if `low`, else in float32; h [M * k, 2 F] in sorted order, empty unless `keep`."""
    x, w1, w3, w2, weights, experts = _contiguous(x, w1, w3, w2, weights, experts)
    M, k, E, D, width = _sizes(x, w1, weights)
    dtype = torch.bfloat16 if low else torch.float32
    o = x.new_empty(M, D, dtype=dtype)
    h = x.new_empty(M * k if keep else 0, 2 * width, dtype=dtype)
    wrong = experts.new_empty(1)
    kernel("grouped_mlp_forward", _FORWARD)(
        *_types(low, x, w1, weights),
        *(x, w1, w3, w2, weights, experts, _sums(x, dtype), o, h if keep else None, wrong),
        *(M, k, E, D, width),
    )
    if (place := wrong.item()) >= 0:
        raise wrong_expert(int(experts.view(-1)[int(place)]), E)
    return o, h


@torch.library.custom_op("kimi_linear::grouped_mlp_cpu_backward", mutates_args=())
def grouped_mlp_cpu_backward(
    d_o: Tensor,
    x: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    weights: Tensor,
    experts: Tensor,
    h: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Equations 3 to 5: gradients of x, w1, w3, w2 and weights."""
    d_o, x, w1, w3, w2, weights, experts = _contiguous(d_o, x, w1, w3, w2, weights, experts)
    d_x, d_w1, d_w3, d_w2 = (torch.empty_like(t) for t in (x, w1, w3, w2))
    d_weights = torch.empty_like(weights, dtype=torch.float32)
    kernel("grouped_mlp_backward", _BACKWARD)(
        *_types(h.dtype == torch.bfloat16, x, w1, weights),
        *(d_o, x, w1, w3, w2, weights, experts, h, _sums(x, x.dtype), d_x, d_w1, d_w3, d_w2, d_weights),
        *_sizes(x, w1, weights),
    )
    return d_x, d_w1, d_w3, d_w2, d_weights.to(weights.dtype)


@grouped_mlp_cpu.register_fake
def _fake(
    x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, weights: Tensor, experts: Tensor, keep: bool, low: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch.bfloat16 if low else torch.float32
    kept = (experts.numel() if keep else 0, 2 * w1.shape[1])
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(kept, dtype=dtype)


@grouped_mlp_cpu_backward.register_fake
def _fake_backward(d_o: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in inputs[:5])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _formula(ctx: Any, d_o: Tensor, _: Any) -> tuple[Any, ...]:
    return (*grouped_mlp_cpu_backward(d_o, *ctx.saved_tensors), None, None, None)


grouped_mlp_cpu.register_autograd(_formula, setup_context=_save)


def _as_read(x: Tensor, *matrices: Tensor) -> tuple[Tensor, ...]:
    """Return tensors that the kernels read: float32 or bfloat16, the matrices alike. Only autocast needs casts."""
    if x.dtype not in DTYPES:
        x = x.bfloat16()
    if len({w.dtype for w in matrices}) > 1 or matrices[0].dtype not in DTYPES:
        matrices = tuple(w.bfloat16() for w in matrices)
    return (x, *matrices)


def run(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Run the op, keeping h only when a backward can follow."""
    low = autocast_dtype(x) == torch.bfloat16
    if weights.dtype not in DTYPES:
        weights = weights.float()
    inputs = (*_as_read(x, w1, w3, w2), weights)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    o: Tensor = grouped_mlp_cpu(*inputs, experts, keep, low)[0]
    return o
