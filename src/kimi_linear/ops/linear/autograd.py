"""Fake kernels and the autograd formula every backend of the linear layer shares."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def empty_gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return new gradients of x, weight and bias; one that is not needed has no elements."""
    grad_x = x.new_empty(x.shape if needed[0] else (0,))
    grad_weight = weight.new_empty(weight.shape if needed[1] else (0,))
    like = weight if bias is None else bias
    return grad_x, grad_weight, like.new_empty((weight.shape[0],) if needed[2] else (0,))


def register(forward: Any, backward: Callable[..., Any]) -> None:
    """Give a forward op and its backward op their fake kernels, and the forward its autograd formula."""
    forward.register_fake(lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])))
    fake = backward.register_fake  # type: ignore[attr-defined]
    fake(lambda grad, x, weight, bias, needed: empty_gradients(x, weight, bias, needed))

    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def formula(ctx: Any, grad: Tensor) -> Any:
        needed = list(ctx.needs_input_grad)
        grads = backward(grad, *ctx.saved_tensors, needed)
        return tuple(found if wanted else None for found, wanted in zip(grads, needed, strict=True))

    forward.register_autograd(formula, setup_context=setup_context)
