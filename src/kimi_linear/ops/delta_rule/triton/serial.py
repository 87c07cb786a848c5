"""The chain over chunks, forward and in reverse. One program a sequence, value head and block of BV value channels."""

import triton
import triton.language as tl

from kimi_linear.ops.delta_rule.triton.prepare import NOTHING, write_strength
from kimi_linear.ops.triton.device import dot, save


@triton.jit
def load_tile(x, base, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the matrix [ROWS, COLUMNS] that lies at `base` of a workspace."""
    return tl.load(x + base + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def load_transposed(x, base, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return its transpose, [COLUMNS, ROWS]."""
    return tl.load(x + base + tl.arange(0, COLUMNS)[:, None] + tl.arange(0, ROWS)[None, :] * COLUMNS)


@triton.jit
def read(
    x, base, state, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BV: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr
):
    """Return the product of the matrix [ROWS, COLUMNS] at `base` of a workspace and a state [COLUMNS, BV].

    PARTS sums over as many parts of the columns side by side, one a warp, and adds them up: with few rows every warp
    would else hold the whole matrix in registers.
    """
    if PARTS == 1:
        return dot(load_tile(x, base, ROWS, COLUMNS), state, WIDE)
    LENGTH: tl.constexpr = COLUMNS // PARTS
    part, i, c = tl.arange(0, PARTS)[:, None, None], tl.arange(0, ROWS)[None, :, None], tl.arange(0, LENGTH)
    tile = tl.load(x + base + i * COLUMNS + part * LENGTH + c[None, None, :])
    return tl.sum(dot(tile, tl.reshape(state, [PARTS, LENGTH, BV]), WIDE), 0)


@triton.jit
def load_values(x, rows, valid, head, HV, v, V: tl.constexpr):
    """Return channels v of one head of x [tokens, HV, V] as float32, zero outside."""
    at = (rows[:, None] * HV + head) * V + v[None, :]
    return tl.load(x + at, mask=valid[:, None] & (v < V)[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["beta_scale", "HV"])
def forward_kernel(
    value, beta, qd, ed, kd, total, scores, inverse, initial,
    o, final, states, written,
    cu_seqlens, first, beta_scale,
    HV,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    BETA: tl.constexpr, ERASE: tl.constexpr, HAS_INITIAL: tl.constexpr, GAIN: tl.constexpr,
    OUTPUT: tl.constexpr, FINAL: tl.constexpr, KEEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """R = M (z - e~ S), O = q~ S + P R, S <- Diag(exp G_C) S + k^T R.

    OUTPUT writes o; FINAL the final states; KEEP the state [K, V] entering every chunk, and R [C, V]. GAIN starts
    from the identity and writes no values: then S is what a run multiplies the state entering it by. Grid: value blocks
    * HV * N, value blocks innermost.
    """
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    PARTS: tl.constexpr = KP // 32 if C < 64 and KP > 64 else 1
    pid = tl.program_id(0).to(tl.int64)
    v = (pid % BLOCKS).to(tl.int32) * BV + tl.arange(0, BV)
    row = pid // BLOCKS
    sequence, head = row // HV, row % HV
    i, c = tl.arange(0, C), tl.arange(0, KP)
    inside = (c < K)[:, None] & (v < V)[None, :]
    cell = c[:, None] * V + v[None, :]
    state = tl.zeros([KP, BV], tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial + row * K * V + cell, mask=inside, other=0.0).to(tl.float32)
    if GAIN:
        state = tl.where(c[:, None] == v[None, :], 1.0, 0.0)
    start, end = tl.load(cu_seqlens + sequence).to(tl.int64), tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    chunk = tl.load(first + sequence).to(tl.int64)
    for step in range(tl.cdiv(end - start, C).to(tl.int32)):
        rows = start + step * C + i
        valid = rows < end
        base = (chunk + step) * HV + head
        if KEEP:
            save(states + base * K * V + cell, state, inside)
        x = tl.zeros([C, BV], tl.float32)
        if not GAIN:
            x = load_values(value, rows, valid, head, HV, v, V)
        if BETA != 0:
            x *= write_strength(beta, rows, valid, head, HV, beta_scale, BETA)[:, None]
        if ERASE != NOTHING:
            x -= read(ed, base * C * KP, state, C, KP, BV, PARTS, WIDE)
            x = dot(load_tile(inverse, base * C * C, C, C), x, WIDE)
        if KEEP:
            at = (base * C + i[:, None]) * V + v[None, :]
            save(written + at, x, (v < V)[None, :])
        if OUTPUT:
            y = read(qd, base * C * KP, state, C, KP, BV, PARTS, WIDE)
            y += dot(load_tile(scores, base * C * C, C, C), x, WIDE)
            at = (rows[:, None] * HV + head) * V + v[None, :]
            save(o + at, y, valid[:, None] & (v < V)[None, :])
        state *= tl.load(total + base * KP + c)[:, None]
        state += dot(load_transposed(kd, base * C * KP, C, KP), x, WIDE)
    if FINAL:
        tl.store(final + row * K * V + cell, state, mask=inside)


@triton.jit(do_not_specialize=["HV"])
def reverse_kernel(
    d_o, d_final, qd, ed, kd, total, scores, inverse,
    d_z, d_states, d_initial,
    cu_seqlens, first,
    HV,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    ERASE: tl.constexpr, HAS_FINAL: tl.constexpr, INITIAL: tl.constexpr, KEEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dz = M^T (P^T dO + k^ dS'), dS = q~^T dO + Diag(exp G_C) dS' - e~^T dz, from the last chunk to the first.

    KEEP writes dz [C, V] of every chunk and the gradient dS' [K, V] of the state leaving it; INITIAL that of the
    initial states. Grid as the forward's.
    """
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    PARTS: tl.constexpr = KP // 32 if C < 64 and KP > 64 else 1
    pid = tl.program_id(0).to(tl.int64)
    v = (pid % BLOCKS).to(tl.int32) * BV + tl.arange(0, BV)
    row = pid // BLOCKS
    sequence, head = row // HV, row % HV
    i, c = tl.arange(0, C), tl.arange(0, KP)
    inside = (c < K)[:, None] & (v < V)[None, :]
    cell = c[:, None] * V + v[None, :]
    d_state = tl.zeros([KP, BV], tl.float32)
    if HAS_FINAL:
        d_state = tl.load(d_final + row * K * V + cell, mask=inside, other=0.0).to(tl.float32)
    start, end = tl.load(cu_seqlens + sequence).to(tl.int64), tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    chunk = tl.load(first + sequence).to(tl.int64)
    count = tl.cdiv(end - start, C).to(tl.int32)
    for back in range(count):
        step = count - 1 - back
        rows = start + step * C + i
        valid = rows < end
        base = (chunk + step) * HV + head
        if KEEP:
            save(d_states + base * K * V + cell, d_state, inside)
        d_y = load_values(d_o, rows, valid, head, HV, v, V)
        d_x = dot(load_transposed(scores, base * C * C, C, C), d_y, WIDE)
        d_x += read(kd, base * C * KP, d_state, C, KP, BV, PARTS, WIDE)
        d_state *= tl.load(total + base * KP + c)[:, None]
        d_state += dot(load_transposed(qd, base * C * KP, C, KP), d_y, WIDE)
        if ERASE != NOTHING:
            d_x = dot(load_transposed(inverse, base * C * C, C, C), d_x, WIDE)
            d_state -= dot(load_transposed(ed, base * C * KP, C, KP), d_x, WIDE)
        if KEEP:
            at = (base * C + i[:, None]) * V + v[None, :]
            save(d_z + at, d_x, (v < V)[None, :])
    if INITIAL:
        tl.store(d_initial + row * K * V + cell, d_state, mask=inside)
