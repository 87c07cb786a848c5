"""What the prefill backends share: value checks of a pack, fake kernels, and the autograd formula."""

from typing import Any

from torch import Tensor

from kimi_linear.base.errors import ShapeError
from kimi_linear.ops.checks import check_cu_seqlens_values


def check_packed_values(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None) -> None:
    """Raise ShapeError unless the offsets are valid and every sequence has at least as many keys as queries."""
    if cu_seqlens is None or cu_seqlens_k is None:
        return
    check_cu_seqlens_values(cu_seqlens, q.shape[1])
    if cu_seqlens_k is cu_seqlens:
        return
    check_cu_seqlens_values(cu_seqlens_k, k.shape[1])
    missing = cu_seqlens.diff() > cu_seqlens_k.diff()
    if missing.any():
        n = int(missing.nonzero()[0])
        raise ShapeError(
            f"attention: sequence {n} has {int(cu_seqlens.diff()[n])} queries but {int(cu_seqlens_k.diff()[n])} keys; "
            "give the keys of every query too, the cached ones first."
        )


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[-1])


def _fake_backward(d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, cu_seqlens, cu_seqlens_k, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens, cu_seqlens_k)


def register(forward: Any, backward: Any) -> None:
    """Give a forward op and its backward op their fake kernels, and the forward its autograd formula."""
    forward.register_fake(_fake_forward)
    backward.register_fake(_fake_backward)

    def formula(ctx: Any, d_o: Tensor) -> tuple[Any, ...]:
        gradients = backward(d_o, *ctx.saved_tensors, ctx.scale, ctx.window)
        return (*gradients, None, None, None, None)

    forward.register_autograd(formula, setup_context=_save)
