"""Linear cross entropy on the CPU: csrc/cross_entropy.cpp. Equations and ways as in chunk.py; logits stay float32."""

import torch
from torch import Tensor

from kimi_linear.ops import native
from kimi_linear.ops.cross_entropy import autograd
from kimi_linear.ops.cross_entropy.labels import counted_rows
from kimi_linear.ops.native.library import DTYPES

# Logits held at a time, 32 MiB: every chunk reads the weight once and adds to its gradient once.
_CHUNK_ELEMENTS = 1 << 23
_LEAST_ROWS, _MOST_ROWS = 128, 1024
# Up to here packing the weight costs more than it saves.
_FEW_ROWS = 48
# Panels of packed operands are that wide, or a half or a quarter.
_PANEL = 32


def _packed(hidden: Tensor, columns: int, depth: int) -> Tensor:
    # Memory for an operand of the products.
    words = (depth + 1) // 2 if hidden.dtype == torch.bfloat16 else depth
    return hidden.new_empty((columns + _PANEL - 1) // _PANEL * _PANEL * words, dtype=torch.int32)


def _known(weight: Tensor) -> Tensor:
    weight = weight if weight.dtype in DTYPES else weight.float()
    return weight if weight.stride(1) == 1 else weight.contiguous()


def _run(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    chunk: int | None,
    *,
    loss: Tensor | None = None,
    total: Tensor | None = None,
    grad_rows: Tensor | None = None,
    grad_hidden: Tensor | None = None,
    grad_weight: Tensor | None = None,
) -> None:
    # Fill the results that are given; gradients must hold zeros.
    M, D = hidden.shape
    V = weight.shape[0]
    known, rows = _known(weight), hidden if hidden.stride(1) == 1 else hidden.contiguous()
    chunk = max(1, min(M, chunk or min(_MOST_ROWS, max(_LEAST_ROWS, _CHUNK_ELEMENTS // V))))
    by_row = None if M <= _FEW_ROWS else _packed(hidden, V, D)
    by_column = None if M <= _FEW_ROWS or grad_hidden is None else _packed(hidden, D, V)
    try:
        native.kernel("cross_entropy", "ipiipipippppppppiiii")(
            *(DTYPES[hidden.dtype], rows, rows.stride(0), DTYPES[known.dtype], known, known.stride(0)),
            *(labels.contiguous(), ignore_index, loss, total, grad_rows, grad_hidden, grad_weight),
            *(hidden.new_empty(chunk * V, dtype=torch.float32), by_row, by_column, M, D, V, chunk),
        )
    except RuntimeError:
        counted_rows(labels, ignore_index, V)
        raise


@torch.library.custom_op("kimi_linear::linear_cross_entropy_cpu", mutates_args=())
def linear_cross_entropy_cpu(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, chunk: int | None
) -> Tensor:
    """Return the loss of each row, [M], in float32."""
    loss = hidden.new_zeros(hidden.shape[0], dtype=torch.float32)
    _run(hidden, weight, labels, ignore_index, chunk, loss=loss)
    return loss


@torch.library.custom_op("kimi_linear::linear_cross_entropy_cpu_backward", mutates_args=())
def linear_cross_entropy_cpu_backward(
    grad_rows: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of hidden and weight for one gradient a row; the logits are formed again."""
    grad_hidden = hidden.new_zeros(hidden.shape)
    grad_weight = hidden.new_zeros(weight.shape, dtype=torch.float32)
    gradients = {"grad_rows": grad_rows.contiguous(), "grad_hidden": grad_hidden, "grad_weight": grad_weight}
    _run(hidden, weight, labels, ignore_index, chunk, **gradients)
    return grad_hidden, grad_weight.to(weight.dtype)


@torch.library.custom_op("kimi_linear::linear_cross_entropy_cpu_online", mutates_args=())
def linear_cross_entropy_cpu_online(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, chunk: int | None, with_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed loss and, for a gradient of one, dhidden and dweight (in float32)."""
    total, grad_hidden = hidden.new_zeros((), dtype=torch.float32), hidden.new_zeros(hidden.shape)
    grad_weight = hidden.new_zeros(weight.shape if with_weight else 0, dtype=torch.float32)
    given = grad_weight if with_weight else None
    _run(hidden, weight, labels, ignore_index, chunk, total=total, grad_hidden=grad_hidden, grad_weight=given)
    return total, grad_hidden, grad_weight


run = autograd.register(linear_cross_entropy_cpu, linear_cross_entropy_cpu_backward, linear_cross_entropy_cpu_online)
