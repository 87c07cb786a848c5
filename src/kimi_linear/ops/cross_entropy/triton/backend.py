"""The `triton` backend of linear cross entropy: chunk.py's equations, with one kernel for all between the products.

A chunk is three matrix products of torch and one launch, which turns the chunk's logits into losses and, in their own
memory and dtype, into the factor (p - onehot) dloss of chunk.py's Eq. 3. Nothing waits for the device: rows that do not
count stay in their chunk, with hidden taken as zero, and get a zero loss and zero gradients. Imports triton when it
first runs.
"""

import torch
from torch import Tensor

from kimi_linear.base import env
from kimi_linear.ops.autocast import without_autocast
from kimi_linear.ops.checks import compute_dtype
from kimi_linear.ops.cross_entropy import autograd
from kimi_linear.ops.cross_entropy.chunk import product_dtype
from kimi_linear.ops.cross_entropy.labels import counted_rows

# Every chunk reads the weight twice, and reads and writes its float32 gradient: few and large ones move fewer bytes.
_CHUNK_BYTES = 1 << 27
# Rows of the tiles of matrix products: the default is a multiple, and never less.
_TILE_ROWS = 128
# Logits a program takes at a time.
_MOST_COLUMNS = 4096


def default_rows(V: int, element_size: int) -> int:
    """Return how many rows of logits are held at a time: up to 128 MiB of them, in multiples of 128 rows."""
    return max(1, _CHUNK_BYTES // (V * element_size) // _TILE_ROWS) * _TILE_ROWS


def consume(
    logits: Tensor, labels: Tensor, ignore_index: int, factors: Tensor | None, losses: Tensor, grad: bool
) -> None:
    """Fill in the losses of a chunk of logits; with grad, put the gradients of the logits in their place.

    Args:
        logits: [c, V], contiguous, bfloat16 or float32.
        labels: [c], int64.
        ignore_index: Rows with this label get zeros.
        factors: The gradient of each loss, [c]. Default: ones.
        losses: [c], float32, written.
        grad: Whether to form gradients.
    """
    from kimi_linear.ops.cross_entropy.triton.kernels import row_kernel
    from kimi_linear.ops.triton.launch import padded, start

    rows, V = logits.shape
    start(
        *(row_kernel, rows, logits, labels, factors, losses, ignore_index),
        V=V,
        BLOCK=min(_MOST_COLUMNS, padded(V)),
        HAS_FACTORS=factors is not None,
        WRITE=grad,
        num_warps=8,
    )


class _Chunks:
    """The logits of one chunk of rows after another, in one buffer used over and over."""

    def __init__(self, hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, chunk: int | None) -> None:
        (M, _), V = hidden.shape, weight.shape[0]
        # On a GPU a look at the labels would wait for it; there a label outside of the vocabulary makes NaNs.
        if not labels.is_cuda or env.read("KIMI_LINEAR_DEBUG"):
            counted_rows(labels, ignore_index, V)
        self.weight = weight.to(product_dtype(hidden))
        self.labels, self.ignore_index = labels.contiguous(), ignore_index
        self._hidden, self._ignored = hidden, (labels == ignore_index).unsqueeze(1)
        rows = max(1, min(M, chunk or default_rows(V, self.weight.element_size())))
        self.parts = [slice(row, min(row + rows, M)) for row in range(0, M, rows)]
        self._logits = hidden.new_empty(rows, V, dtype=self.weight.dtype)
        self.losses = hidden.new_empty(M, dtype=torch.float32)

    def run(self, part: slice, factors: Tensor | None, grad: bool) -> tuple[Tensor, Tensor]:
        """Write a chunk's losses; return its hidden [c, D], and its logits or their gradient [c, V] until the next."""
        # Rows that do not count may hold anything, and 0 * NaN is NaN.
        hidden = self._hidden[part].to(self.weight.dtype).masked_fill(self._ignored[part], 0)
        logits = torch.mm(hidden, self.weight.t(), out=self._logits[: hidden.shape[0]])
        factors = None if factors is None else factors[part]
        consume(logits, self.labels[part], self.ignore_index, factors, self.losses[part], grad)
        return hidden, logits


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to the float32 total, without rounding the product."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        # The CPU has no product of bfloat16 into float32.
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    chunk: int | None,
    grad_rows: Tensor | None,
    with_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # The summed loss, dhidden in the dtype of hidden and dweight in float32 (empty unless asked for).
    # grad_rows None: every row's factor is one.
    chunks = _Chunks(hidden, weight, labels, ignore_index, chunk)
    factors = None if grad_rows is None else grad_rows.contiguous()
    grad_hidden = hidden.new_empty(hidden.shape)
    grad_weight = hidden.new_zeros(weight.shape if with_weight else 0, dtype=compute_dtype(hidden))
    for part in chunks.parts:
        h, slopes = chunks.run(part, factors, grad=True)
        # Eq. 3.
        grad_hidden[part] = slopes @ chunks.weight
        if with_weight:
            _accumulate(grad_weight, slopes.t(), h)
    return chunks.losses.sum(), grad_hidden, grad_weight


@torch.library.custom_op("kimi_linear::linear_cross_entropy_triton", mutates_args=())
def linear_cross_entropy_triton(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, chunk: int | None
) -> Tensor:
    """Return the loss of each row, [M], in float32."""
    with without_autocast(hidden.device):
        chunks = _Chunks(hidden, weight, labels, ignore_index, chunk)
        for part in chunks.parts:
            chunks.run(part, None, grad=False)
    return chunks.losses


@torch.library.custom_op("kimi_linear::linear_cross_entropy_triton_backward", mutates_args=())
def linear_cross_entropy_triton_backward(
    grad_rows: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of hidden and weight for one gradient a row; the logits are formed again."""
    with without_autocast(hidden.device):
        _, grad_hidden, grad_weight = _gradients(hidden, weight, labels, ignore_index, chunk, grad_rows, True)
    return grad_hidden, grad_weight.to(weight.dtype)


@torch.library.custom_op("kimi_linear::linear_cross_entropy_triton_online", mutates_args=())
def linear_cross_entropy_triton_online(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, chunk: int | None, with_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed loss and, for a gradient of one, dhidden and dweight (in float32)."""
    with without_autocast(hidden.device):
        return _gradients(hidden, weight, labels, ignore_index, chunk, None, with_weight)


run = autograd.register(
    linear_cross_entropy_triton, linear_cross_entropy_triton_backward, linear_cross_entropy_triton_online
)
