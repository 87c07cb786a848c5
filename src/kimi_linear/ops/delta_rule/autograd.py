"""Fake kernels and autograd formulas shared by the backends of the delta rule."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kimi_linear.ops.delta_rule.layout import wide_dtype


def fake_forward(
    q: Tensor,
    k: Tensor,
    erase_key: Tensor | None,
    write_value: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    read: str,
) -> tuple[Tensor, Tensor]:
    """Return shapes and dtypes of (o, final_state)."""
    B, _, HV, V = write_value.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = write_value.new_empty(N, HV, q.shape[-1], V, dtype=wide_dtype(write_value.dtype))
    return torch.empty_like(write_value, memory_format=torch.contiguous_format), state


def fake_backward(
    d_o: Tensor,
    d_final: Tensor,
    q: Tensor,
    k: Tensor,
    erase_key: Tensor | None,
    write_value: Tensor,
    log_decay: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """Return shapes and dtypes of the six gradients."""
    inputs = (q, k, q.new_empty(0) if erase_key is None else erase_key, write_value, log_decay, d_final)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep the tensors of the call for the backward, nothing else."""
    ctx.tensors = [isinstance(x, Tensor) for x in inputs]
    ctx.plain = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))


def saved_inputs(ctx: Any) -> list[Any]:
    """Return the call's inputs in order."""
    saved = iter(ctx.saved_tensors)
    return [next(saved) if is_tensor else plain for is_tensor, plain in zip(ctx.tensors, ctx.plain, strict=True)]


def register(forward: Any, backward: Callable[..., Any]) -> None:
    """Give a forward op and its backward op their fake kernels, and the forward its autograd formula."""
    forward.register_fake(fake_forward)
    backward.register_fake(fake_backward)  # type: ignore[attr-defined]

    def formula(ctx: Any, d_o: Tensor, d_final: Tensor) -> tuple[Any, ...]:
        inputs = saved_inputs(ctx)
        d_q, d_k, d_e, d_z, d_g, d_state = backward(d_o, d_final, *inputs)
        erase, initial = inputs[2], inputs[6]
        return (
            d_q,
            d_k,
            None if erase is None else d_e,
            d_z,
            d_g,
            None,
            None if initial is None else d_state,
            None,
            None,
        )

    forward.register_autograd(formula, setup_context=save_inputs)
