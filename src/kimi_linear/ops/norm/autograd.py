"""Fake kernels and the autograd formula every backend of the norms shares."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def register(forward: Any, backward: Callable[..., Any]) -> None:
    """Give a forward op and its backward op their fake kernels, and the forward its autograd formula.

    The forward takes tensors, x first, then plain values; its result is like x. The backward takes the gradient of the
    result and then the same arguments, and returns a gradient like each tensor: a tuple, or a tensor if it is one.
    """

    def fake_forward(x: Tensor, *rest: Any) -> Tensor:
        return x.new_empty(x.shape)

    def fake_backward(grad_y: Tensor, *inputs: Any) -> Any:
        grads = tuple(value.new_empty(value.shape) for value in inputs if isinstance(value, Tensor))
        return grads if len(grads) > 1 else grads[0]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
        ctx.plain = tuple(value for value in inputs if not isinstance(value, Tensor))

    def formula(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        grads = backward(grad_y, *ctx.saved_tensors, *ctx.plain)
        return *((grads,) if isinstance(grads, Tensor) else grads), *(None for _ in ctx.plain)

    forward.register_fake(fake_forward)
    backward.register_fake(fake_backward)  # type: ignore[attr-defined]
    forward.register_autograd(formula, setup_context=setup_context)
