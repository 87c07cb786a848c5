"""Fake kernels and the autograd formula every backend of the forget gate shares."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from kimi_linear.ops.checks import compute_dtype


def _fake_forward(x: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None) -> Tensor:
    return x.new_empty(x.shape, dtype=compute_dtype(x))


def _fake_backward(
    grad: Tensor, x: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    A_grad, bias_grad = (x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (A_log, dt_bias))
    return x.new_empty(x.shape), A_grad, bias_grad


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.lower_bound = inputs
    ctx.save_for_backward(*tensors)


def register(forward: Any, backward: Callable[..., Any]) -> None:
    """Give a forward op and its backward op their fake kernels, and the forward its autograd formula."""

    def formula(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A_log, dt_bias = ctx.saved_tensors
        grad_x, grad_log, grad_bias = backward(grad, x, A_log, dt_bias, ctx.lower_bound)
        return grad_x, None if A_log is None else grad_log, None if dt_bias is None else grad_bias, None

    forward.register_fake(_fake_forward)
    backward.register_fake(_fake_backward)  # type: ignore[attr-defined]
    forward.register_autograd(formula, setup_context=_save)
