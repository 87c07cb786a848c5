"""Everything of a chunk that does not depend on the state: factors, scores, inverse. One program a chunk and head."""

import triton
import triton.language as tl

from kimi_linear.ops.delta_rule.triton.device import (
    in_pair,
    join,
    levels,
    log_decay,
    pair_of_row,
    unit_lower_inverse,
)
from kimi_linear.ops.triton.device import dot, save

# Where the erase key comes from.
NOTHING: tl.constexpr = tl.constexpr(0)
GIVEN: tl.constexpr = tl.constexpr(1)
WEIGHED: tl.constexpr = tl.constexpr(2)
# What beta is.
STRENGTH: tl.constexpr = tl.constexpr(1)
LOGIT: tl.constexpr = tl.constexpr(2)
NORM_EPS: tl.constexpr = tl.constexpr(1e-6)


@triton.jit
def chunk_rows(cu_seqlens, first, owner, chunk, C: tl.constexpr):
    """Return the tokens of a chunk's rows, int64 [C], and which rows are tokens."""
    sequence = tl.load(owner + chunk)
    start, end = tl.load(cu_seqlens + sequence).to(tl.int64), tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    rows = start + (chunk - tl.load(first + sequence)) * C + tl.arange(0, C)
    return rows, rows < end


@triton.jit
def load_rows(x, rows, valid, head, heads, c, dim: tl.constexpr):
    """Return channels c of one head of x [tokens, heads, dim] as float32, zero outside."""
    at = (rows[:, None] * heads + head) * dim + c[None, :]
    return tl.load(x + at, mask=valid[:, None] & (c < dim)[None, :], other=0.0).to(tl.float32)


@triton.jit
def write_strength(beta, rows, valid, head, heads, beta_scale, BETA: tl.constexpr):
    """Return the strength of every row, zero outside."""
    b = tl.load(beta + rows * heads + head, mask=valid, other=0.0).to(tl.float32)
    if BETA == LOGIT:
        b = tl.where(valid, beta_scale * tl.sigmoid(b), 0.0)
    return b


@triton.jit
def gate_input(g, dt_bias, rows, valid, head, HV, c, K: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Return the gate's logits with their bias, [C, B]."""
    u = load_rows(g, rows, valid, head, HV, c, K)
    if HAS_BIAS:
        u += tl.load(dt_bias + head * K + c, mask=c < K, other=0.0).to(tl.float32)[None, :]
    return u


@triton.jit
def load_log_decay(
    g, dt_bias, rate, bound, rows, valid, head, HV, c, K: tl.constexpr, GATE: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """Return the log decay of channels c, [C, B]; zero where there is no token, whose state must not decay."""
    u = gate_input(g, dt_bias, rows, valid, head, HV, c, K, HAS_BIAS)
    if GATE == 0:
        return u
    inside = valid[:, None] & (c < K)[None, :]
    return tl.where(inside, log_decay(u, rate, bound, GATE), 0.0)


@triton.jit
def head_rate(A_log, head, HAS_RATE: tl.constexpr):
    """Return exp(A_log) of a head, 1 without it."""
    if HAS_RATE:
        return tl.exp(tl.load(A_log + head).to(tl.float32))
    return 1.0


@triton.jit
def reciprocal_norms(x, rows, valid, head, heads, K: tl.constexpr, KP: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """Return 1 / sqrt(sum x^2 + eps) of every row, [C]."""
    squares = tl.zeros([C], tl.float32)
    for block in range(KP // B):
        tile = load_rows(x, rows, valid, head, heads, block * B + tl.arange(0, B), K)
        squares += tl.sum(tile * tile, 1)
    return tl.rsqrt(squares + NORM_EPS)


@triton.jit
def decay_matrices(g, rows, valid, head, HV, C: tl.constexpr, PRE: tl.constexpr):
    """Return, of a decay a head: exp(G_i - G_j), exp(G'_i - G_j), i > j; exp(G), exp(G'), exp(G_C - G), [C, 1] each.

    Built by joining blocks, as the scores of a decay a channel are: no difference of sums is formed.
    """
    # Vectors: as columns, they would lay out the matrices badly.
    row = tl.exp(tl.load(g + rows * HV + head, mask=valid, other=0.0).to(tl.float32))
    erase, key = tl.full([C], 1.0, tl.float32), tl.full([C], 1.0, tl.float32)
    post, pre = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for level in tl.range(levels(C), num_stages=1):
        mask = in_pair(level, C, False)
        post += tl.where(mask, row[:, None] * key[None, :], 0.0)
        second, last = pair_of_row(level, C)
        other = tl.gather(row, last, 0)
        if PRE:
            pre += tl.where(mask, erase[:, None] * key[None, :], 0.0)
            erase *= tl.where(second, other, 1.0)
        row *= tl.where(second, other, 1.0)
        key *= tl.where(second, 1.0, other)
    if not PRE:
        pre, erase = post, row
    return post, pre, row[:, None], erase[:, None], key[:, None]


@triton.jit(do_not_specialize=["bound", "beta_scale", "scale", "N", "H", "HV", "HE"])
def prepare_kernel(
    q, k, e, g, beta, A_log, dt_bias,
    cu_seqlens, first, owner,
    qd, ed, kd, total, scores, inverse,
    bound, beta_scale, scale,
    N, H, HV, HE,
    K: tl.constexpr, KP: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    NORM: tl.constexpr, GATE: tl.constexpr, BETA: tl.constexpr, ERASE: tl.constexpr,
    SCALAR: tl.constexpr, PRE: tl.constexpr, HAS_RATE: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write q exp(G), e exp(G'), k exp(G_C - G) [C, KP], exp(G_C) [KP], P and M [C, C] of one chunk and value head.

    Grid: chunks * HV; programs behind the last chunk leave. README.md has the equations.
    """
    pid = tl.program_id(0).to(tl.int64)
    chunk, head = pid // HV, pid % HV
    if tl.load(owner + chunk) >= N:
        return
    rows, valid = chunk_rows(cu_seqlens, first, owner, chunk, C)
    key_head = head // (HV // H)
    q_norm, k_norm = tl.full([C], 1.0, tl.float32), tl.full([C], 1.0, tl.float32)
    if NORM:
        q_norm = reciprocal_norms(q, rows, valid, key_head, H, K, KP, B, C)
        k_norm = reciprocal_norms(k, rows, valid, key_head, H, K, KP, B, C)
    strength = tl.zeros([C], tl.float32)
    if BETA != 0:
        strength = write_strength(beta, rows, valid, head, HV, beta_scale, BETA)
    rate = head_rate(A_log, head, HAS_RATE)
    p, lower = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    diagonal = tl.zeros([C], tl.float32)
    if SCALAR:
        post, pre, f_row, f_erase, f_key = decay_matrices(g, rows, valid, head, HV, C, PRE)
    i = tl.arange(0, C)
    for block in range(KP // B):
        c = block * B + tl.arange(0, B)
        at = (pid * C + i[:, None]) * KP + c[None, :]
        q_row = load_rows(q, rows, valid, key_head, H, c, K) * (q_norm * scale)[:, None]
        k_row = load_rows(k, rows, valid, key_head, H, c, K) * k_norm[:, None]
        e_row = strength[:, None] * k_row
        if ERASE == GIVEN:
            e_row = load_rows(e, rows, valid, head // (HV // HE), HE, c, K)
        diagonal += tl.sum(q_row * k_row, 1)
        if SCALAR:
            p += dot(q_row, tl.trans(k_row), WIDE)
            if ERASE != NOTHING:
                lower += dot(e_row, tl.trans(k_row), WIDE)
            q_row, e_row, k_row = q_row * f_row, e_row * f_erase, k_row * f_key
            whole = f_row + tl.zeros([C, B], tl.float32)
        else:
            whole = tl.exp(load_log_decay(g, dt_bias, rate, bound, rows, valid, head, HV, c, K, GATE, HAS_BIAS))
            q_row = q_row * whole
            if not PRE:
                e_row = e_row * whole
            for level in tl.range(levels(C), num_stages=1):
                keys = tl.trans(k_row)
                p += tl.where(in_pair(level, C, False), dot(q_row, keys, WIDE), 0.0)
                if ERASE != NOTHING:
                    lower += tl.where(in_pair(level, C, False), dot(e_row, keys, WIDE), 0.0)
                whole, to_start, to_end = join(whole, level, C, B)
                q_row, e_row, k_row = q_row * to_start, e_row * to_start, k_row * to_end
        tl.store(total + pid * KP + c, tl.sum(tl.where((i == C - 1)[:, None], whole, 0.0), 0))
        save(qd + at, q_row, None)
        save(kd + at, k_row, None)
        if ERASE != NOTHING:
            save(ed + at, e_row, None)
    if SCALAR:
        p, lower = p * post, lower * pre
    p += tl.where(i[:, None] == i[None, :], diagonal[:, None], 0.0)
    square = pid * C * C + i[:, None] * C + i[None, :]
    save(scores + square, p, None)
    if ERASE != NOTHING:
        save(inverse + square, unit_lower_inverse(lower, C), None)
