"""Fake kernels and the autograd formula every backend of the router shares."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kimi_linear.ops.checks import compute_dtype


def _fake_forward(logits: Tensor, bias: Tensor, top_k: int, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = (*logits.shape[:-1], top_k)
    return logits.new_empty(shape, dtype=compute_dtype(logits)), logits.new_empty(shape, dtype=torch.int64)


def _fake_backward(d_weights: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, _, ctx.renormalize, ctx.scaling, ctx.activation = inputs
    ctx.save_for_backward(logits, output[1])
    ctx.mark_non_differentiable(output[1])


def register(forward: Any, backward: Callable[..., Any]) -> None:
    """Give a forward op and its backward op their fake kernels, and the forward its autograd formula."""
    forward.register_fake(_fake_forward)
    backward.register_fake(_fake_backward)  # type: ignore[attr-defined]

    def formula(ctx: Any, d_weights: Tensor, _: Any) -> tuple[Any, ...]:
        d_logits = backward(d_weights, *ctx.saved_tensors, ctx.renormalize, ctx.scaling, ctx.activation)
        return d_logits, None, None, None, None, None

    forward.register_autograd(formula, setup_context=_save)
