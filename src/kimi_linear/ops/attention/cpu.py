"""Causal softmax attention of many queries in csrc/attention_forward.cpp and attention_backward.cpp.

The forward keeps two numbers a query and head, its largest score and one over the sum of the powers below it, from
which the backward takes the probabilities again. Nothing of size T x S exists in either.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kimi_linear.ops import native
from kimi_linear.ops.attention.autograd import check_packed_values
from kimi_linear.ops.native.library import DTYPES
from kimi_linear.ops.registry import Call

_MOST_KEYS = 1 << 30


def refuse(call: Call) -> list[str]:
    """Return why the kernels cannot run a call of `attention`."""
    reasons = native.refuse(call)
    if call.sizes["S"] > _MOST_KEYS:
        reasons.append(f"counts keys in 32 bits, at most {_MOST_KEYS}")
    return reasons


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(tensors: Sequence[Tensor]) -> Tensor:
    """Return the strides of batch, token and head of each tensor, one after another, as the kernels read them."""
    return torch.tensor([stride for x in tensors for stride in x.stride()[:3]], dtype=torch.int64)


def _offsets(cu_seqlens: Tensor | None) -> Tensor | None:
    return None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()


def _sizes(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int | None) -> tuple[int, ...]:
    (B, T, Hq, K), (S, Hkv) = q.shape, k.shape[1:3]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return N, T, S, Hq, Hkv, K, v.shape[-1], min(window or 0, S + 1), DTYPES[q.dtype]


@torch.library.custom_op("kimi_linear::attention_cpu", mutates_args=())
def attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward; arguments as in `attention`, all given. Returns o, and the maxima and shares [B, Hq, T]."""
    check_packed_values(q, k, cu_seqlens, cu_seqlens_k)
    q, k, v = (_dense(x) for x in (q, k, v))
    (B, T, Hq), V = q.shape[:3], v.shape[-1]
    o = q.new_empty(B, T, Hq, V)
    maximum, share = (q.new_empty(B, Hq, T, dtype=torch.float32) for _ in range(2))
    native.kernel("attention_forward", "pppppppppiiiiiiiiif")(
        *(q, k, v, _offsets(cu_seqlens), _offsets(cu_seqlens_k), o, maximum, share, _strides([q, k, v, o])),
        *(*_sizes(q, k, v, cu_seqlens, window), scale),
    )
    return o, maximum, share


@torch.library.custom_op("kimi_linear::attention_cpu_backward", mutates_args=())
def attention_cpu_backward(
    d_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    maximum: Tensor,
    share: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous."""
    d_o, q, k, v, o = (_dense(x) for x in (d_o, q, k, v, o))
    d_q, d_k, d_v = (x.new_empty(x.shape) for x in (q, k, v))
    native.kernel("attention_backward", "pppppppppppppiiiiiiiiif")(
        *(q, k, v, o, d_o, d_q, d_k, d_v, _offsets(cu_seqlens), _offsets(cu_seqlens_k)),
        *(maximum.contiguous(), share.contiguous(), _strides([q, k, v, o, d_o, d_q, d_k, d_v])),
        *(*_sizes(q, k, v, cu_seqlens, window), scale),
    )
    return d_q, d_k, d_v


@attention_cpu.register_fake
def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    B, T, Hq = q.shape[:3]
    maximum, share = (q.new_empty(B, Hq, T, dtype=torch.float32) for _ in range(2))
    return q.new_empty(B, T, Hq, v.shape[-1]), maximum, share


@attention_cpu_backward.register_fake
def _fake_backward(d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, cu_seqlens_k, ctx.scale, ctx.window = inputs
    o, maximum, share = output
    ctx.mark_non_differentiable(maximum, share)
    ctx.save_for_backward(q, k, v, o, maximum, share, cu_seqlens, cu_seqlens_k)


def _formula(ctx: Any, d_o: Tensor, *_: Any) -> tuple[Any, ...]:
    gradients = attention_cpu_backward(d_o, *ctx.saved_tensors, ctx.scale, ctx.window)
    return (*gradients, None, None, None, None)


attention_cpu.register_autograd(_formula, setup_context=_save)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    window: int | None,
) -> Tensor:
    """Run the op and return its output alone."""
    o: Tensor = attention_cpu(q, k, v, cu_seqlens, cu_seqlens_k, scale, window)[0]
    return o
