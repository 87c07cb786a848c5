"""Fake kernels and the autograd formula every backend of the short convolution shares."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def fake_forward(
    x: Tensor, weight: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """Return shapes and dtypes of (y, final_state)."""
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(sequences, x.shape[2], weight.shape[1] - 1)


def fake_backward(
    grad_y: Tensor,
    grad_final: Tensor,
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return shapes and dtypes of the gradients of x, weight and initial_state (empty where there is none)."""
    state = x.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), state


def register(forward: Any, backward: Callable[..., Any]) -> None:
    """Give a forward op and its backward op their fake kernels, and the forward its autograd formula."""
    forward.register_fake(fake_forward)
    backward.register_fake(fake_backward)  # type: ignore[attr-defined]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.silu = inputs
        ctx.save_for_backward(*tensors)

    def formula(ctx: Any, grad_y: Tensor, grad_final: Tensor) -> tuple[Any, ...]:
        x, weight, initial_state, cu_seqlens = ctx.saved_tensors
        grads = backward(grad_y, grad_final, x, weight, initial_state, cu_seqlens, ctx.silu)
        return grads[0], grads[1], None if initial_state is None else grads[2], None, None

    forward.register_autograd(formula, setup_context=setup_context)
