"""Losses and gradients of a chunk of logits, one program a row: read twice, written once, in place."""

import triton
import triton.language as tl

from kimi_linear.ops.triton.device import save

# Below every logit: the largest of no logit.
LEAST: tl.constexpr = tl.constexpr(-3.4e38)
# Blocks of a row under way at once.
STAGES: tl.constexpr = tl.constexpr(3)


@triton.jit(do_not_specialize=["ignore_index"])
def row_kernel(
    logits, labels, factors, losses,
    ignore_index,
    V: tl.constexpr, BLOCK: tl.constexpr, HAS_FACTORS: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """loss = log sum_v exp(z_v) - z_label, and with WRITE z <- (softmax(z) - onehot(label)) factor.

    A row labelled ignore_index is not read: its loss and gradient are zero. With any other label outside [0, V) both
    are NaN. Grid: rows.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    z_row = logits + row * V
    v = tl.arange(0, BLOCK)
    if label == ignore_index:
        tl.store(losses + row, 0.0)
        if WRITE:
            for first in range(0, V, BLOCK):
                save(z_row + first + v, tl.zeros([BLOCK], tl.float32), first + v < V)
        return
    named = (label >= 0) & (label < V)
    z_label = tl.load(z_row + label, mask=named, other=float("nan")).to(tl.float32)
    # Every lane's largest logit so far, and its sum of exp(z - largest): one exponential a logit.
    largest, total = tl.full([BLOCK], LEAST, tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, V, BLOCK, num_stages=STAGES):
        z = tl.load(z_row + first + v, mask=first + v < V, other=float("-inf")).to(tl.float32)
        rise = z - largest
        shrink = tl.exp(-tl.abs(rise))
        total = tl.where(rise > 0, total * shrink + 1.0, total + shrink)
        largest = tl.maximum(largest, z)
    top = tl.max(largest, 0)
    whole = tl.sum(total * tl.exp(largest - top), 0)
    # The difference first: the logarithm is lost beside a large logit.
    tl.store(losses + row, tl.log(whole) + (top - z_label))
    if WRITE:
        factor = tl.where(named, 1.0, float("nan"))
        if HAS_FACTORS:
            factor *= tl.load(factors + row).to(tl.float32)
        share = factor / whole
        for first in tl.range(0, V, BLOCK, num_stages=STAGES):
            z = tl.load(z_row + first + v, mask=first + v < V, other=float("-inf")).to(tl.float32)
            slope = tl.exp(z - top) * share - tl.where(first + v == label, factor, 0.0)
            save(z_row + first + v, slope, first + v < V)
