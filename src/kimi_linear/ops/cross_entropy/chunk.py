"""Linear cross entropy a chunk of tokens at a time: the logits of one chunk are all that ever exist.

With p = softmax(z) of a chunk of logits z = hidden weight^T,

    loss_m  = log sum_v exp(z_mv) - z_{m, label_m}                                    (1)
    dz_m    = (p_m - onehot(label_m)) dloss_m                                         (2)
    dhidden = dz weight,  dweight = dz^T hidden                                       (3)

For a summed loss dloss_m is one number, known to be a factor of everything, so the forward forms (3) with factor one
while it holds p, and the backward only multiplies: three products in place of four. For losses a row the forward keeps
nothing and the backward forms z again. Rows that do not count are left out before the first product.
"""

import torch
from torch import Tensor

from kimi_linear.ops.autocast import without_autocast
from kimi_linear.ops.checks import compute_dtype
from kimi_linear.ops.cross_entropy import autograd
from kimi_linear.ops.cross_entropy.labels import counted_rows

# A float32 chunk of logits of this many elements is 16 MiB, below the size at which the C library's allocator returns
# memory to the system after every use.
_CHUNK_ELEMENTS = 1 << 22
# Fewer rows than this leave the matrix products short of work.
_LEAST_ROWS = 128


def product_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of the operands of products."""
    # float16 has too little range for probabilities over a large vocabulary; bfloat16 has float32's.
    return torch.bfloat16 if hidden.dtype == torch.bfloat16 else compute_dtype(hidden)


class _Chunks:
    """The softmax of one chunk of rows after another, in two buffers used over and over."""

    def __init__(self, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None) -> None:
        product, wide = product_dtype(hidden), compute_dtype(hidden)
        self._hidden, self._labels = hidden, labels
        self.weight = weight.to(product)
        rows = chunk or max(_LEAST_ROWS, _CHUNK_ELEMENTS // weight.shape[0])
        rows = max(min(rows, hidden.shape[0]), 1)
        self.parts = [slice(row, min(row + rows, hidden.shape[0])) for row in range(0, hidden.shape[0], rows)]
        self._logits = hidden.new_empty(rows, weight.shape[0], dtype=product)
        self._softmax = hidden.new_empty(rows, weight.shape[0], dtype=wide)

    def softmax(self, part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return hidden [c, D], label [c, 1], p [c, V] and loss [c] of one chunk, valid until the next."""
        hidden, label = self._hidden[part].to(self.weight.dtype), self._labels[part].unsqueeze(1)
        logits = torch.mm(hidden, self.weight.t(), out=self._logits[: hidden.shape[0]])
        p = torch.softmax(logits, 1, dtype=self._softmax.dtype, out=self._softmax[: hidden.shape[0]])
        # Eq. 1. The largest probability is at least 1 / V, so its logarithm is safe where the label's may not be.
        log_sum = logits.amax(1).to(p.dtype) - p.amax(1).log_()
        return hidden, label, p, log_sum - logits.gather(1, label).squeeze(1).to(p.dtype)

    def factor(self, grad_logits: Tensor) -> Tensor:
        """Return the gradient of the logits in the dtype of the products, in place of the logits where they differ."""
        if grad_logits.dtype == self._logits.dtype:
            return grad_logits
        return self._logits[: grad_logits.shape[0]].copy_(grad_logits)


def _gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    chunk: int | None,
    grad_rows: Tensor | None,
    with_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # The summed loss, dhidden in the dtype of hidden and dweight in the compute dtype (empty unless asked for).
    # grad_rows None: every row's factor is one.
    rows = counted_rows(labels, ignore_index, weight.shape[0])
    if rows is not None:
        labels = labels.index_select(0, rows)
        grad_rows = None if grad_rows is None else grad_rows.index_select(0, rows)
    counted = hidden if rows is None else hidden.index_select(0, rows)
    chunks = _Chunks(counted, weight, labels, chunk)
    wide = compute_dtype(hidden)
    total = hidden.new_zeros((), dtype=wide)
    grad_hidden = hidden.new_empty(counted.shape)
    grad_weight = hidden.new_zeros(weight.shape if with_weight else 0, dtype=wide)
    for part in chunks.parts:
        h, label, p, loss = chunks.softmax(part)
        total += loss.sum()
        # Eq. 2.
        p.scatter_add_(1, label, p.new_full(label.shape, -1.0))
        if grad_rows is not None:
            p.mul_(grad_rows[part].unsqueeze(1))
        grad_logits = chunks.factor(p)
        # Eq. 3.
        grad_hidden[part] = grad_logits @ chunks.weight
        if not with_weight:
            continue
        if grad_logits.dtype == wide:
            grad_weight.addmm_(grad_logits.t(), h)
        else:
            grad_weight += grad_logits.t() @ h
    if rows is not None:
        grad_hidden = hidden.new_zeros(hidden.shape).index_copy_(0, rows, grad_hidden)
    return total, grad_hidden, grad_weight


def _losses(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, chunk: int | None) -> Tensor:
    loss = hidden.new_zeros(hidden.shape[0], dtype=compute_dtype(hidden))
    rows = counted_rows(labels, ignore_index, weight.shape[0])
    if rows is not None:
        hidden, labels = hidden.index_select(0, rows), labels.index_select(0, rows)
    chunks = _Chunks(hidden, weight, labels, chunk)
    counted = loss.new_empty(hidden.shape[0])
    for part in chunks.parts:
        counted[part] = chunks.softmax(part)[3]
    return counted if rows is None else loss.index_copy_(0, rows, counted)


@torch.library.custom_op("kimi_linear::linear_cross_entropy_chunk", mutates_args=())
def linear_cross_entropy_chunk(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, chunk: int | None
) -> Tensor:
    """Return the loss of each row, [M], in the compute dtype."""
    with without_autocast(hidden.device):
        return _losses(hidden, weight, labels, ignore_index, chunk)


@torch.library.custom_op("kimi_linear::linear_cross_entropy_chunk_backward", mutates_args=())
def linear_cross_entropy_chunk_backward(
    grad_rows: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of hidden and weight for one gradient a row; the logits are formed again."""
    with without_autocast(hidden.device):
        _, grad_hidden, grad_weight = _gradients(hidden, weight, labels, ignore_index, chunk, grad_rows, True)
    return grad_hidden, grad_weight.to(weight.dtype)


@torch.library.custom_op("kimi_linear::linear_cross_entropy_chunk_online", mutates_args=())
def linear_cross_entropy_chunk_online(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, chunk: int | None, with_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed loss and, for a gradient of one, dhidden and dweight (in the compute dtype)."""
    with without_autocast(hidden.device):
        return _gradients(hidden, weight, labels, ignore_index, chunk, None, with_weight)


run = autograd.register(
    linear_cross_entropy_chunk, linear_cross_entropy_chunk_backward, linear_cross_entropy_chunk_online
)
