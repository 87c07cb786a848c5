"""Linear cross entropy written from its equation, with all logits at once: for checking, and for small sizes.

z_m    = weight hidden_m                                                          (1)
loss_m = log sum_v exp(z_mv) - z_{m, label_m}, or 0 for an ignored row            (2)
"""

from typing import Any

import torch
from torch import Tensor

from kimi_linear.ops.autocast import without_autocast
from kimi_linear.ops.checks import compute_dtype
from kimi_linear.ops.cross_entropy.labels import counted_rows


def _widened(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, ...]:
    # Which rows count, as 0 or 1; labels [M, 1] that are safe to index with; hidden, zero where a row does not count,
    # and weight, both in the compute dtype.
    counted_rows(labels, ignore_index, weight.shape[0])
    counted = labels != ignore_index
    dtype = compute_dtype(hidden)
    target = labels.where(counted, 0).unsqueeze(1)
    return counted.to(dtype), target, hidden.to(dtype).masked_fill(~counted.unsqueeze(1), 0), weight.to(dtype)


@torch.library.custom_op("kimi_linear::linear_cross_entropy_reference", mutates_args=())
def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Return the loss of each row, [M], in the compute dtype."""
    counted, target, wide_hidden, wide_weight = _widened(hidden, weight, labels, ignore_index)
    # Eq. 1.
    with without_autocast(hidden.device):
        logits = wide_hidden @ wide_weight.t()
    # Eq. 2.
    return (logits.logsumexp(1) - logits.gather(1, target).squeeze(1)) * counted


@torch.library.custom_op("kimi_linear::linear_cross_entropy_reference_backward", mutates_args=())
def linear_cross_entropy_reference_backward(
    grad_rows: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of hidden and weight."""
    counted, target, wide_hidden, wide_weight = _widened(hidden, weight, labels, ignore_index)
    with without_autocast(hidden.device):
        # Eq. 2: dz = (softmax(z) - onehot(label)) dloss.
        grad_logits = (wide_hidden @ wide_weight.t()).softmax(1)
        grad_logits.scatter_add_(1, target, grad_logits.new_full(target.shape, -1.0))
        grad_logits *= (grad_rows * counted).unsqueeze(1)
        # Eq. 1.
        grad_hidden, grad_weight = grad_logits @ wide_weight, grad_logits.t() @ wide_hidden
    return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype)


@linear_cross_entropy_reference.register_fake
def _(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden))


@linear_cross_entropy_reference_backward.register_fake
def _(grad_rows: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.ignore_index = inputs
    ctx.save_for_backward(*tensors)


def _formula(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
    return *linear_cross_entropy_reference_backward(grad_rows, *ctx.saved_tensors, ctx.ignore_index), None, None


linear_cross_entropy_reference.register_autograd(_formula, setup_context=_save)


def run(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, chunk: int | None, is_summed: bool
) -> Tensor:
    """Return the loss of each row, or their sum; there are no chunks."""
    rows: Tensor = linear_cross_entropy_reference(hidden, weight, labels, ignore_index)
    return rows.sum() if is_summed else rows
