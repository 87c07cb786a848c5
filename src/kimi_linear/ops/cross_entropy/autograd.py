"""Fake kernels and autograd formulas of the backends that form gradients a chunk at a time.

A backend is three custom ops:

    rows(hidden, weight, labels, ignore_index, chunk)
        the loss of each row, [M]
    rows_backward(grad_rows, hidden, weight, labels, ignore_index, chunk)
        dhidden, dweight
    online(hidden, weight, labels, ignore_index, chunk, with_weight)
        the summed loss, and for a gradient of one dhidden and, where asked for, dweight in the compute dtype
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kimi_linear.ops.checks import compute_dtype

Run = Callable[[Tensor, Tensor, Tensor, int, int | None, bool], Tensor]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.ignore_index, ctx.chunk = inputs
    ctx.save_for_backward(*tensors)


def _save_online(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, weight, *_, ctx.with_weight = inputs
    ctx.weight_dtype = weight.dtype
    _, grad_hidden, grad_weight = output
    # Without this autograd would make zeros of their size for gradients nobody has.
    ctx.mark_non_differentiable(grad_hidden, grad_weight)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_hidden, grad_weight)


def _formula_online(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None, None
    grad_hidden, grad_weight = ctx.saved_tensors
    weight_grad = (grad_weight * grad).to(ctx.weight_dtype) if ctx.with_weight else None
    return (grad_hidden * grad).to(grad_hidden.dtype), weight_grad, None, None, None, None


def _fake_rows(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, chunk: int | None) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden))


def _fake_rows_backward(
    grad_rows: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, chunk: int | None
) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _fake_online(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, chunk: int | None, with_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = compute_dtype(hidden)
    grad_weight = hidden.new_empty(weight.shape if with_weight else (0,), dtype=wide)
    return hidden.new_empty((), dtype=wide), hidden.new_empty(hidden.shape), grad_weight


def register(rows: Any, rows_backward: Any, online: Any) -> Run:
    """Give the three ops their fake kernels and formulas, and return the function that runs the backend."""

    def formula(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        return *rows_backward(grad_rows, *ctx.saved_tensors, ctx.ignore_index, ctx.chunk), None, None, None

    rows.register_fake(_fake_rows)
    rows_backward.register_fake(_fake_rows_backward)
    online.register_fake(_fake_online)
    rows.register_autograd(formula, setup_context=_save)
    online.register_autograd(_formula_online, setup_context=_save_online)

    def run(
        hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, chunk: int | None, is_summed: bool
    ) -> Tensor:
        """Return the loss of each row, or their sum, whose gradients come with the forward."""
        if is_summed and torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
            total: Tensor
            total, *_ = online(hidden, weight, labels, ignore_index, chunk, weight.requires_grad)
            return total
        losses: Tensor = rows(hidden, weight, labels, ignore_index, chunk)
        return losses.sum() if is_summed else losses

    return run
