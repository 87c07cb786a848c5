"""The fake kernel and the autograd formula every backend of the rotation shares.

A rotation's transpose is the rotation by the opposite angle, so the backward is the forward at -position.
"""

from typing import Any

from torch import Tensor


def _fake(x: Tensor, positions: Tensor, theta: float, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, positions, ctx.theta, ctx.inverse = inputs
    ctx.save_for_backward(positions)


def register(rotate: Any) -> None:
    """Give an op its fake kernel and its autograd formula."""

    def formula(ctx: Any, d_y: Tensor) -> tuple[Any, ...]:
        (positions,) = ctx.saved_tensors
        return rotate(d_y, positions, ctx.theta, not ctx.inverse), None, None, None

    rotate.register_fake(_fake)
    rotate.register_autograd(formula, setup_context=_save)
