"""Device functions of the delta rule's kernels: products, gates, the joins of a chunk's blocks, the inverse.

C rows of a chunk; B channels of a block of K. Row tiles are float32 in registers; operands of products are rounded to
the working dtype, bfloat16 for half precision and float32 (three tf32 products each) for float32.
"""

import triton
import triton.language as tl

from kimi_linear.ops.triton.device import dot, dot32

SOFTPLUS: tl.constexpr = tl.constexpr(1)
BOUNDED: tl.constexpr = tl.constexpr(2)

LEAF: tl.constexpr = tl.constexpr(16)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), without overflow."""
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def log_decay(u, rate, bound, GATE: tl.constexpr):
    """Return -rate softplus(u), or bound * sigmoid(rate u)."""
    if GATE == SOFTPLUS:
        return -rate * softplus(u)
    return bound * tl.sigmoid(rate * u)


@triton.jit
def forgotten(WIDE: tl.constexpr):
    """Return the decay below which its gradient, which has it as a factor, is set to zero.

    There the running sum leaves rounding errors alone, which a gate's rate would magnify: exp(-40), or with products in
    bfloat16 exp(-16).
    """
    if WIDE:
        return 4e-18
    return 1e-7


@triton.jit
def first_and_second(x, PAIRS: tl.constexpr, B: tl.constexpr):
    """Return the two halves x[2p], x[2p + 1] of the pairs of rows of x [2 PAIRS, B], each [PAIRS, B]."""
    pairs = tl.reshape(x, [PAIRS, 2, B])
    second = (tl.arange(0, 2) == 1)[None, :, None]
    return tl.sum(tl.where(second, 0.0, pairs), 1), tl.sum(tl.where(second, pairs, 0.0), 1)


@triton.jit
def carry(x, factor, IN_SECOND: tl.constexpr, C: tl.constexpr, LENGTH: tl.constexpr, B: tl.constexpr):
    """Multiply the rows of every pair's second (or first) block in x [C, B] by the pair's factor [C / 2 LENGTH, B]."""
    blocks = tl.reshape(x, [C // (2 * LENGTH), 2, LENGTH, B])
    chosen = (tl.arange(0, 2) == IN_SECOND)[None, :, None, None]
    return tl.reshape(blocks * tl.where(chosen, factor[:, None, None, :], 1.0), [C, B])


@triton.jit
def pair_mask(LENGTH: tl.constexpr, C: tl.constexpr):
    """Return where (row, column) is (second, first) block of one pair of blocks of LENGTH, bool [C, C]."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    same = (i // (2 * LENGTH)) == (j // (2 * LENGTH))
    return same & ((i // LENGTH) % 2 == 1) & ((j // LENGTH) % 2 == 0)


@triton.jit
def diagonal_blocks(x, C: tl.constexpr):
    """Return the 16 x 16 blocks on the diagonal of x [C, C], as [C / 16, 16, 16]."""
    N: tl.constexpr = C // LEAF
    blocks = tl.reshape(x, [N, LEAF, N, LEAF])
    same = tl.arange(0, N)[:, None, None, None] == tl.arange(0, N)[None, None, :, None]
    return tl.sum(tl.where(same, blocks, 0.0), 2)


@triton.jit
def from_diagonal_blocks(x, C: tl.constexpr):
    """Return x [C / 16, 16, 16] on the diagonal of a matrix [C, C]."""
    N: tl.constexpr = C // LEAF
    same = tl.arange(0, N)[:, None, None, None] == tl.arange(0, N)[None, None, :, None]
    return tl.reshape(tl.where(same, x[:, :, None, :], 0.0), [C, C])


@triton.jit
def unit_lower_inverse(lower, C: tl.constexpr, WIDE: tl.constexpr):
    """Return (I + lower)^-1 of a strictly lower triangular matrix [C, C].

    Leaves of 16 rows by forward substitution, then [[A, 0], [L, D]]^-1 = [[A^-1, 0], [-D^-1 L A^-1, D^-1]], as
    X <- X - X L X with L the block below the diagonal. A power series of the whole matrix would overflow.
    """
    N: tl.constexpr = C // LEAF
    leaf = diagonal_blocks(lower, C)
    rows, columns = tl.arange(0, LEAF)[None, :, None], tl.arange(0, LEAF)[None, None, :]
    x = tl.where(rows == columns, 1.0, 0.0) + tl.zeros([N, LEAF, LEAF], tl.float32)
    for i in range(1, LEAF):
        row = tl.sum(tl.where(rows == i, leaf, 0.0), 1)
        solved = -tl.sum(row[:, :, None] * x, 1)
        x = tl.where(rows == i, solved[:, None, :] + tl.where(columns == i, 1.0, 0.0), x)
    inverse = from_diagonal_blocks(x, C)
    if C >= 32:
        off = tl.where(pair_mask(16, C), lower, 0.0)
        inverse -= dot32(dot32(inverse, off, WIDE), inverse, WIDE)
    if C >= 64:
        off = tl.where(pair_mask(32, C), lower, 0.0)
        inverse -= dot32(dot32(inverse, off, WIDE), inverse, WIDE)
    return inverse


@triton.jit
def join_scores(rows, keys, LENGTH: tl.constexpr, C: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr):
    """Return rows keys^T of every pair's (second, first) block, zero elsewhere, [C, C] (LENGTH >= 16)."""
    return tl.where(pair_mask(LENGTH, C), dot(rows, tl.trans(keys), WIDE), 0.0)


@triton.jit
def join_scores_in_leaf(rows, keys, LENGTH: tl.constexpr, C: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr):
    """Return the same inside every 16 rows, [C / 16, 16, 16] (LENGTH < 16)."""
    N: tl.constexpr = C // LEAF
    i, j = tl.arange(0, LEAF)[:, None], tl.arange(0, LEAF)[None, :]
    same = (i // (2 * LENGTH)) == (j // (2 * LENGTH))
    mask = same & ((i // LENGTH) % 2 == 1) & ((j // LENGTH) % 2 == 0)
    a, b = tl.reshape(rows, [N, LEAF, B]), tl.reshape(keys, [N, LEAF, B])
    return tl.where(mask[None, :, :], dot(a, tl.trans(b, (0, 2, 1)), WIDE), 0.0)
