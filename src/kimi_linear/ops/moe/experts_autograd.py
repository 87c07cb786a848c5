"""What the backends that keep h1 and h3 share: fake kernels, the autograd formula, and when to keep."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _fake_forward(
    x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, weights: Tensor, experts: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    kept = (experts.numel() if keep else 0, w1.shape[1])
    return x.new_empty(x.shape), x.new_empty(kept), x.new_empty(kept)


def _fake_backward(d_o: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in inputs[:5])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.keep = inputs
    _, h1, h3 = output
    ctx.mark_non_differentiable(h1, h3)
    ctx.save_for_backward(*tensors, h1, h3)


def register(forward: Any, backward: Any) -> Callable[..., Tensor]:
    """Give a forward op and its backward op their fake kernels, and the forward its autograd formula; return the call.

    The forward takes (x, w1, w3, w2, weights, experts, keep) and returns (o, h1, h3), the last two empty without keep;
    the backward takes (d_o, x, w1, w3, w2, weights, experts, h1, h3). The call keeps only when a backward can follow.
    """
    forward.register_fake(_fake_forward)
    backward.register_fake(_fake_backward)

    def formula(ctx: Any, d_o: Tensor, *_: Any) -> tuple[Any, ...]:
        return (*backward(d_o, *ctx.saved_tensors), None, None)

    forward.register_autograd(formula, setup_context=_save)

    def run(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        inputs = (x, w1, w3, w2, weights)
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
        o: Tensor = forward(*inputs, experts, keep)[0]
        return o

    return run
