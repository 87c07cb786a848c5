"""Fake kernels and the autograd formula every backend of the gated activation shares."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _shape_of(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def register(forward: Any, backward: Callable[..., Any]) -> None:
    """Give a forward op and its backward op their fake kernels, and the forward its autograd formula."""
    forward.register_fake(lambda gate, up: _shape_of(gate))
    backward.register_fake(lambda grad, gate, up: (_shape_of(gate), _shape_of(up)))  # type: ignore[attr-defined]

    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def formula(ctx: Any, grad: Tensor) -> Any:
        return backward(grad, *ctx.saved_tensors)

    forward.register_autograd(formula, setup_context=setup_context)
