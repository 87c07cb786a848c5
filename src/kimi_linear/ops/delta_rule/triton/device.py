"""Device functions of the delta rule's kernels: products, gates, the joins of a chunk's blocks, the inverse.

C rows of a chunk; B channels of a block of K. Row tiles are float32 in registers; operands of products are rounded to
the working dtype, bfloat16 for half precision and float32 (three tf32 products each) for float32.
"""

import triton
import triton.language as tl

from kimi_linear.ops.triton.device import dot32

SOFTPLUS: tl.constexpr = tl.constexpr(1)
BOUNDED: tl.constexpr = tl.constexpr(2)

LEAF: tl.constexpr = tl.constexpr(16)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), without overflow."""
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def log_decay(u, rate, bound, GATE: tl.constexpr):
    """Return -rate softplus(u), bound * sigmoid(rate u), or u, which is a log decay already."""
    if GATE == 0:
        return u
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
def in_pair(level, C: tl.constexpr, UPPER: tl.constexpr):
    """Return where (row, column) is (second, first) block of one pair of blocks of 2^level rows, bool [C, C].

    UPPER: where it is (first, second).
    """
    first, second = tl.arange(0, C)[None, :] >> level, tl.arange(0, C)[:, None] >> level
    if UPPER:
        first, second = tl.arange(0, C)[:, None] >> level, tl.arange(0, C)[None, :] >> level
    # The number of a second block is that of its first, an even one, plus one.
    return second == tl.where(first & 1 == 0, first + 1, -1)


@triton.jit
def levels(C: tl.constexpr):
    """Return log2(C), how many joins make one block of C rows."""
    return 4 if C == 16 else 5 if C == 32 else 6


@triton.jit
def pair_of_row(level, C: tl.constexpr):
    """Return whether a row [C] is in the second of a pair of blocks of 2^level rows, and the other block's last row."""
    i = tl.arange(0, C)
    second = ((i >> level) & 1) == 1
    return second, tl.where(second, ((i >> level) << level) - 1, i | ((2 << level) - 1))


@triton.jit
def join(decay, level, C: tl.constexpr, B: tl.constexpr):
    """Join the pairs of blocks of 2^level rows; decay [C, B] is that from a block's start up to and with each row.

    Returns it for the joined blocks, and the factors that carry rows to the pair's start (1 but in the second block)
    and to its end (1 but in the first), [C, B] each.
    """
    second, last = pair_of_row(level, C)
    # What the other block decays by stands in its last row.
    other = tl.gather(decay, tl.broadcast_to(last[:, None], [C, B]), 0)
    to_start, to_end = tl.where(second[:, None], other, 1.0), tl.where(second[:, None], 1.0, other)
    return decay * to_start, to_start, to_end


@triton.jit
def blocks(x, LENGTH: tl.constexpr, OTHER: tl.constexpr, C: tl.constexpr):
    """Return the blocks of LENGTH rows and columns on the diagonal of x [C, C], as [C / LENGTH, LENGTH, LENGTH].

    OTHER = 1: those beside it, in the column of the other block of the row's pair.
    """
    N: tl.constexpr = C // LENGTH
    at = tl.arange(0, N)
    same = (at[:, None, None, None] ^ OTHER) == at[None, None, :, None]
    return tl.sum(tl.where(same, tl.reshape(x, [N, LENGTH, N, LENGTH]), 0.0), 2)


@triton.jit
def leaf_inverses(lower, C: tl.constexpr):
    """Return the inverses of the 16 x 16 blocks on the diagonal of I + lower, by forward substitution."""
    N: tl.constexpr = C // LEAF
    leaf = blocks(lower, LEAF, 0, C)
    rows, columns = tl.arange(0, LEAF)[None, :, None], tl.arange(0, LEAF)[None, None, :]
    x = tl.where(rows == columns, 1.0, 0.0) + tl.zeros([N, LEAF, LEAF], tl.float32)
    for i in range(1, LEAF):
        row = tl.sum(tl.where(rows == i, leaf, 0.0), 1)
        solved = -tl.sum(row[:, :, None] * x, 1)
        x = tl.where(rows == i, solved[:, None, :] + tl.where(columns == i, 1.0, 0.0), x)
    return x


@triton.jit
def merge(x, lower, LENGTH: tl.constexpr, C: tl.constexpr):
    """Return the inverses of pairs of the blocks x [C / LENGTH, LENGTH, LENGTH], half as many of twice the size."""
    PAIRS: tl.constexpr = C // (2 * LENGTH)
    second = (tl.arange(0, 2) == 1)[None, :, None, None]
    pairs = tl.reshape(x, [PAIRS, 2, LENGTH, LENGTH])
    a, d = tl.sum(tl.where(second, 0.0, pairs), 1), tl.sum(tl.where(second, pairs, 0.0), 1)
    # The block above the diagonal is zero.
    below = tl.sum(tl.reshape(blocks(lower, LENGTH, 1, C), [PAIRS, 2, LENGTH, LENGTH]), 1)
    if PAIRS == 1:
        # Without the dimension, or every warp would form the whole product.
        left, right = tl.reshape(d, [LENGTH, LENGTH]), tl.reshape(a, [LENGTH, LENGTH])
        below = dot32(dot32(left, tl.reshape(below, [LENGTH, LENGTH])), right)[None, :, :]
    else:
        below = dot32(dot32(d, below), a)
    row, column = tl.arange(0, 2)[None, :, None, None, None], tl.arange(0, 2)[None, None, None, :, None]
    diagonal = tl.where(row == 0, a[:, None, :, None, :], d[:, None, :, None, :])
    off = tl.where(row > column, -below[:, None, :, None, :], 0.0)
    return tl.reshape(tl.where(row == column, diagonal, off), [PAIRS, 2 * LENGTH, 2 * LENGTH])


@triton.jit
def unit_lower_inverse(lower, C: tl.constexpr):
    """Return (I + lower)^-1 of a strictly lower triangular matrix [C, C].

    Leaves of 16 rows by forward substitution, then [[A, 0], [L, D]]^-1 = [[A^-1, 0], [-D^-1 L A^-1, D^-1]]. A power
    series of the whole matrix would overflow. Near float32: merged in tf32, a strength up to two costs 3e-3.
    """
    x = leaf_inverses(lower, C)
    if C >= 32:
        x = merge(x, lower, 16, C)
    if C >= 64:
        x = merge(x, lower, 32, C)
    return tl.reshape(x, [C, C])
