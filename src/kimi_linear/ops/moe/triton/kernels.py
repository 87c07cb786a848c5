"""Grouped products of the experts, their gated activation, and the sum over a token's slots.

A = M * k assignments, sorted by expert; order[r] is the assignment of sorted row r, and its token order[r] // SLOTS. A
tile is up to BM rows of one expert, so that a product is one of tiles with that expert's matrix; the grid has room for
the most tiles there can be, and surplus programs leave. Offsets are int64 up to a tile's first row or an expert's first
element, and int32 from there, which saves registers. Equations as numbered in reference.py.
"""

import triton
import triton.language as tl

from kimi_linear.ops.triton.device import INTERPRETED, save


@triton.jit
def add_product(total, a, b, WIDE: tl.constexpr):
    """Return total + a b in float32, of operands in their dtype; with WIDE of float32 ones, in three times tf32."""
    if INTERPRETED:
        return total + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    if WIDE:
        return tl.dot(a, b, total, input_precision="tf32x3")
    return tl.dot(a, b, total)


@triton.jit
def tile_rows(starts, first, tile, expert, BM: tl.constexpr):
    """Return the first sorted row of an expert's tile, of the type of `tile`, int64, and which of its BM rows exist."""
    row = tl.load(starts + expert) + (tile - tl.load(first + expert)) * BM
    return row, row + tl.arange(0, BM) < tl.load(starts + expert + 1)


@triton.jit
def load_matrix(x, rows, columns, WIDTH: tl.constexpr, inside):
    """Return x[rows, columns] of x [.., WIDTH], either of them down or across, zero outside."""
    return tl.load(x + rows * WIDTH + columns, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["E", "SLOTS"])
def gate_up_kernel(
    x, w1, w3, order, starts, first, owner,
    a, h1, h3,
    E, SLOTS,
    D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    KEEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write a = silu(h1) * h3 of Eq. 1, h1 = x w1^T and h3 = x w3^T; KEEP: h1 and h3 too.

    Grid: tiles * blocks of F, blocks innermost.
    """
    BLOCKS: tl.constexpr = (F + BN - 1) // BN
    pid = tl.program_id(0).to(tl.int64)
    tile = pid // BLOCKS
    expert = tl.load(owner + tile).to(tl.int64)
    if expert >= E:
        return
    row, valid = tile_rows(starts, first, tile, expert, BM)
    i, n = tl.arange(0, BM), (pid % BLOCKS).to(tl.int32) * BN + tl.arange(0, BN)
    token = tl.load(order + row + i, mask=valid, other=0) // SLOTS
    gate, up = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32)
    matrix = expert * F * D
    for start in range(0, D, BK):
        d = start + tl.arange(0, BK)
        tokens = load_matrix(x, token[:, None], d[None, :], D, valid[:, None] & (d < D)[None, :])
        # Transposed as they are loaded.
        inside = (d < D)[:, None] & (n < F)[None, :]
        gate = add_product(gate, tokens, load_matrix(w1 + matrix, n[None, :], d[:, None], D, inside), WIDE)
        up = add_product(up, tokens, load_matrix(w3 + matrix, n[None, :], d[:, None], D, inside), WIDE)
    at, out = i[:, None] * F + n[None, :], valid[:, None] & (n < F)[None, :]
    save(a + row * F + at, gate * tl.sigmoid(gate) * up, out)
    if KEEP:
        save(h1 + row * F + at, gate, out)
        save(h3 + row * F + at, up, out)


@triton.jit(do_not_specialize=["E"])
def down_kernel(
    a, w2, order, starts, first, owner,
    y,
    E,
    D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write y = a w2^T of Eq. 1, in the order of assignments. Grid: tiles * blocks of D, blocks innermost."""
    BLOCKS: tl.constexpr = (D + BN - 1) // BN
    pid = tl.program_id(0).to(tl.int64)
    tile = pid // BLOCKS
    expert = tl.load(owner + tile).to(tl.int64)
    if expert >= E:
        return
    row, valid = tile_rows(starts, first, tile, expert, BM)
    i, n = tl.arange(0, BM), (pid % BLOCKS).to(tl.int32) * BN + tl.arange(0, BN)
    total, matrix = tl.zeros([BM, BN], tl.float32), w2 + expert * D * F
    for start in range(0, F, BK):
        f = start + tl.arange(0, BK)
        left = load_matrix(a + row * F, i[:, None], f[None, :], F, valid[:, None] & (f < F)[None, :])
        right = load_matrix(matrix, n[None, :], f[:, None], F, (f < F)[:, None] & (n < D)[None, :])
        total = add_product(total, left, right, WIDE)
    to = tl.load(order + row + i, mask=valid, other=0)
    save(y + to[:, None] * D + n[None, :], total, valid[:, None] & (n < D)[None, :])


@triton.jit(do_not_specialize=["SLOTS"])
def combine_kernel(
    y, weights, o, SLOTS, D: tl.constexpr, BN: tl.constexpr, WEIGHED: tl.constexpr
):  # fmt: skip
    """o = sum_j weights_j y_j over a token's slots, in order; without WEIGHED the plain sum. Grid: M * blocks of D."""
    BLOCKS: tl.constexpr = (D + BN - 1) // BN
    pid = tl.program_id(0).to(tl.int64)
    token, n = pid // BLOCKS, (pid % BLOCKS) * BN + tl.arange(0, BN)
    total = tl.zeros([BN], tl.float32)
    for slot in range(SLOTS):
        row = tl.load(y + (token * SLOTS + slot) * D + n, mask=n < D, other=0.0).to(tl.float32)
        if WEIGHED:
            row *= tl.load(weights + token * SLOTS + slot).to(tl.float32)
        total += row
    save(o + token * D + n, total, n < D)


@triton.jit(do_not_specialize=["E", "SLOTS", "A"])
def activation_backward_kernel(
    d_o, w2, weights, h1, h3, order, starts, first, owner,
    weighed, d_h1, d_h3, d_weights,
    E, SLOTS, A,
    D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """b = w2^T do; write c a, dh1 and dh3 of Eq. 4, and what a block of F adds to dweights of Eq. 3, [blocks, A].

    Grid: tiles * blocks of F, blocks innermost.
    """
    BLOCKS: tl.constexpr = (F + BN - 1) // BN
    pid = tl.program_id(0).to(tl.int64)
    tile, block = pid // BLOCKS, pid % BLOCKS
    expert = tl.load(owner + tile).to(tl.int64)
    if expert >= E:
        return
    row, valid = tile_rows(starts, first, tile, expert, BM)
    i, n = tl.arange(0, BM), block.to(tl.int32) * BN + tl.arange(0, BN)
    assignment = tl.load(order + row + i, mask=valid, other=0)
    token = assignment // SLOTS
    b, matrix = tl.zeros([BM, BN], tl.float32), w2 + expert * D * F
    for start in range(0, D, BK):
        d = start + tl.arange(0, BK)
        left = load_matrix(d_o, token[:, None], d[None, :], D, valid[:, None] & (d < D)[None, :])
        right = load_matrix(matrix, d[:, None], n[None, :], F, (d < D)[:, None] & (n < F)[None, :])
        b = add_product(b, left, right, WIDE)
    at, out = i[:, None] * F + n[None, :], valid[:, None] & (n < F)[None, :]
    gate = tl.load(h1 + row * F + at, mask=out, other=0.0).to(tl.float32)
    up = tl.load(h3 + row * F + at, mask=out, other=0.0).to(tl.float32)
    c = tl.load(weights + assignment, mask=valid, other=0.0).to(tl.float32)[:, None]
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    save(weighed + row * F + at, c * silu * up, out)
    save(d_h1 + row * F + at, c * b * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), out)
    save(d_h3 + row * F + at, c * b * silu, out)
    # Last: before the stores, the sum over columns makes registers spill.
    tl.store(d_weights + block * A + assignment, tl.sum(b * silu * up, 1), mask=valid)


@triton.jit(do_not_specialize=["E"])
def token_backward_kernel(
    d_h1, d_h3, w1, w3, order, starts, first, owner,
    d_rows,
    E,
    D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write an expert's part of dx of Eq. 5, in the order of assignments. Grid: tiles * blocks of D."""
    BLOCKS: tl.constexpr = (D + BN - 1) // BN
    pid = tl.program_id(0).to(tl.int64)
    tile = pid // BLOCKS
    expert = tl.load(owner + tile).to(tl.int64)
    if expert >= E:
        return
    row, valid = tile_rows(starts, first, tile, expert, BM)
    i, n = tl.arange(0, BM), (pid % BLOCKS).to(tl.int32) * BN + tl.arange(0, BN)
    total, matrix = tl.zeros([BM, BN], tl.float32), expert * F * D
    for start in range(0, F, BK):
        f = start + tl.arange(0, BK)
        left, right = valid[:, None] & (f < F)[None, :], (f < F)[:, None] & (n < D)[None, :]
        rows_1 = load_matrix(d_h1 + row * F, i[:, None], f[None, :], F, left)
        total = add_product(total, rows_1, load_matrix(w1 + matrix, f[:, None], n[None, :], D, right), WIDE)
        rows_3 = load_matrix(d_h3 + row * F, i[:, None], f[None, :], F, left)
        total = add_product(total, rows_3, load_matrix(w3 + matrix, f[:, None], n[None, :], D, right), WIDE)
    to = tl.load(order + row + i, mask=valid, other=0)
    save(d_rows + to[:, None] * D + n[None, :], total, valid[:, None] & (n < D)[None, :])


@triton.jit(do_not_specialize=["SLOTS"])
def matrix_backward_kernel(
    left, right, order, starts,
    d_w,
    SLOTS,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    LEFT_TOKENS: tl.constexpr, RIGHT_TOKENS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dw_e = left^T right over an expert's sorted rows, in order, [HEIGHT, WIDTH]; zero for an expert without rows.

    Of what is marked as tokens, [M, ..], a row's token is read. Grid: E * blocks of HEIGHT * blocks of WIDTH.
    """
    ACROSS: tl.constexpr = (WIDTH + BN - 1) // BN
    DOWN: tl.constexpr = (HEIGHT + BM - 1) // BM
    pid = tl.program_id(0).to(tl.int64)
    expert, m = pid // (ACROSS * DOWN), (pid // ACROSS % DOWN).to(tl.int32) * BM + tl.arange(0, BM)
    n = (pid % ACROSS).to(tl.int32) * BN + tl.arange(0, BN)
    total, end = tl.zeros([BM, BN], tl.float32), tl.load(starts + expert + 1)
    for start in range(tl.load(starts + expert), end, BK):
        rows = (start + tl.arange(0, BK)).to(tl.int64)
        valid = rows < end
        from_left, from_right = rows, rows
        if LEFT_TOKENS:
            from_left = tl.load(order + rows, mask=valid, other=0) // SLOTS
        if RIGHT_TOKENS:
            from_right = tl.load(order + rows, mask=valid, other=0) // SLOTS
        # Transposed as it is loaded.
        a = load_matrix(left, from_left[None, :], m[:, None], HEIGHT, (m < HEIGHT)[:, None] & valid[None, :])
        b = load_matrix(right, from_right[:, None], n[None, :], WIDTH, valid[:, None] & (n < WIDTH)[None, :])
        total = add_product(total, a, b, WIDE)
    at = m[:, None] * WIDTH + n[None, :]
    save(d_w + expert * HEIGHT * WIDTH + at, total, (m < HEIGHT)[:, None] & (n < WIDTH)[None, :])
