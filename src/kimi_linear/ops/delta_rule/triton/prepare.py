"""Everything of a chunk that does not depend on the state: factors, scores, inverse. One program a chunk and head."""

import triton
import triton.language as tl

from kimi_linear.ops.delta_rule.triton.device import (
    LEAF,
    carry,
    first_and_second,
    from_diagonal_blocks,
    join_scores,
    join_scores_in_leaf,
    log_decay,
    pair_mask,
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
    """Return, of a decay a head: exp(G_i - G_j), exp(G'_i - G_j), i > j; exp(G), exp(G'), exp(G_C - G), exp(G_C).

    Built by joining blocks, as the scores of a decay a channel are: no difference of sums is formed.
    """
    a = tl.exp(tl.load(g + rows * HV + head, mask=valid, other=0.0).to(tl.float32))[:, None]
    query, key, total = a, tl.full([C, 1], 1.0, tl.float32), a
    erase = a
    if PRE:
        erase = key
    post, pre = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for level in tl.static_range(0, 6):
        if (1 << level) < C:
            mask, flat = pair_mask(1 << level, C), tl.reshape(key, [1, C])
            post += tl.where(mask, query * flat, 0.0)
            pre += tl.where(mask, erase * flat, 0.0)
            one, two = first_and_second(total, C // (2 << level), 1)
            query, erase = carry(query, one, 1, C, 1 << level, 1), carry(erase, one, 1, C, 1 << level, 1)
            key, total = carry(key, two, 0, C, 1 << level, 1), one * two
    return post, pre, query, erase, key, total


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
    p_leaf = tl.zeros([C // LEAF, LEAF, LEAF], tl.float32)
    lower_leaf = tl.zeros([C // LEAF, LEAF, LEAF], tl.float32)
    diagonal = tl.zeros([C], tl.float32)
    if SCALAR:
        post, pre, f_query, f_erase, f_key, f_total = decay_matrices(g, rows, valid, head, HV, C, PRE)
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
            q_row, e_row, k_row = q_row * f_query, e_row * f_erase, k_row * f_key
            tl.store(total + pid * KP + c, tl.sum(f_total, 0) + tl.zeros([B], tl.float32))
        else:
            a = tl.exp(load_log_decay(g, dt_bias, rate, bound, rows, valid, head, HV, c, K, GATE, HAS_BIAS))
            all_of_block = a
            q_row = q_row * a
            if not PRE:
                e_row = e_row * a
            for level in tl.static_range(0, 6):
                if (1 << level) < C:
                    if (1 << level) < LEAF:
                        p_leaf += join_scores_in_leaf(q_row, k_row, 1 << level, C, B, WIDE)
                        if ERASE != NOTHING:
                            lower_leaf += join_scores_in_leaf(e_row, k_row, 1 << level, C, B, WIDE)
                    else:
                        p += join_scores(q_row, k_row, 1 << level, C, B, WIDE)
                        if ERASE != NOTHING:
                            lower += join_scores(e_row, k_row, 1 << level, C, B, WIDE)
                    one, two = first_and_second(all_of_block, C // (2 << level), B)
                    q_row, e_row = carry(q_row, one, 1, C, 1 << level, B), carry(e_row, one, 1, C, 1 << level, B)
                    k_row, all_of_block = carry(k_row, two, 0, C, 1 << level, B), one * two
            tl.store(total + pid * KP + c, tl.reshape(all_of_block, [B]))
        save(qd + at, q_row, None)
        save(kd + at, k_row, None)
        if ERASE != NOTHING:
            save(ed + at, e_row, None)
    if SCALAR:
        p, lower = p * post, lower * pre
    else:
        p += from_diagonal_blocks(p_leaf, C)
        lower += from_diagonal_blocks(lower_leaf, C)
    p += tl.where(i[:, None] == i[None, :], diagonal[:, None], 0.0)
    square = pid * C * C + i[:, None] * C + i[None, :]
    save(scores + square, p, None)
    if ERASE != NOTHING:
        save(inverse + square, unit_lower_inverse(lower, C, WIDE), None)
