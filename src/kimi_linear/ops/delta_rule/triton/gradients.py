"""The gradients of a chunk's scores, then of its channels, once the chains have run; last, group sums and norms."""

import triton
import triton.language as tl

from kimi_linear.ops.delta_rule.triton.device import SOFTPLUS, forgotten, in_pair, join, levels, log_decay, softplus
from kimi_linear.ops.delta_rule.triton.prepare import (
    GIVEN,
    NORM_EPS,
    NOTHING,
    WEIGHED,
    chunk_rows,
    decay_matrices,
    gate_input,
    head_rate,
    load_log_decay,
    load_rows,
    reciprocal_norms,
    write_strength,
)
from kimi_linear.ops.delta_rule.triton.serial import load_values
from kimi_linear.ops.triton.device import dot, save


@triton.jit
def joined(square, level, UPPER: tl.constexpr, C: tl.constexpr):
    """Return the (second, first) blocks of the pairs of 2^level rows of a stored matrix [C, C], zero elsewhere.

    UPPER: the (first, second) blocks of its transpose, loaded as such.
    """
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    at = i * C + j
    if UPPER:
        at = j * C + i
    x = tl.load(square + at)
    return tl.where(in_pair(level, C, UPPER), x, tl.zeros_like(x))


@triton.jit(do_not_specialize=["beta_scale", "N", "H", "HV"])
def scores_kernel(
    q, k, value, beta,
    cu_seqlens, first, owner,
    written, d_o, d_z,
    d_value, d_scores, d_lower, diagonal, norms, d_strength,
    beta_scale,
    N, H, HV,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, B: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    NORM: tl.constexpr, BETA: tl.constexpr, ERASE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write dP and dL of one chunk and value head, strictly lower, dP_ii [C], dv, and the values' part of dbeta.

    With NORM, 1 / |q| and 1 / |k| of the rows too, [2, C]. Grid: chunks * HV.
    """
    pid = tl.program_id(0).to(tl.int64)
    chunk, head = pid // HV, pid % HV
    if tl.load(owner + chunk) >= N:
        return
    rows, valid = chunk_rows(cu_seqlens, first, owner, chunk, C)
    i = tl.arange(0, C)
    if NORM:
        key_head = head // (HV // H)
        tl.store(norms + pid * 2 * C + i, reciprocal_norms(q, rows, valid, key_head, H, K, KP, B, C))
        tl.store(norms + pid * 2 * C + C + i, reciprocal_norms(k, rows, valid, key_head, H, K, KP, B, C))
    strength, d_beta = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    if BETA != 0:
        strength = write_strength(beta, rows, valid, head, HV, beta_scale, BETA)
    p, lower = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    on_diagonal = tl.zeros([C], tl.float32)
    for block in range((V + BV - 1) // BV):
        v = block * BV + tl.arange(0, BV)
        at, columns = (pid * C + i[:, None]) * V + v[None, :], (v < V)[None, :]
        d_y = load_values(d_o, rows, valid, head, HV, v, V)
        x = tl.load(written + at, mask=columns, other=0.0)
        # The transpose is loaded as such: a transposed accumulator as an operand is not to be trusted on Hopper.
        x_t = tl.load(written + (pid * C + i[None, :]) * V + v[:, None], mask=(v < V)[:, None], other=0.0)
        d_x = tl.load(d_z + at, mask=columns, other=0.0).to(tl.float32)
        p += dot(d_y, x_t, WIDE)
        on_diagonal += tl.sum(d_y * x.to(tl.float32), 1)
        if ERASE != NOTHING:
            lower -= dot(d_x, x_t, WIDE)
        out = d_x
        if BETA != 0:
            d_beta += tl.sum(d_x * load_values(value, rows, valid, head, HV, v, V), 1)
            out = d_x * strength[:, None]
        to = (rows[:, None] * HV + head) * V + v[None, :]
        save(d_value + to, out, valid[:, None] & columns)
    below = i[:, None] > i[None, :]
    square = pid * C * C + i[:, None] * C + i[None, :]
    save(d_scores + square, tl.where(below, p, 0.0), None)
    if ERASE != NOTHING:
        save(d_lower + square, tl.where(below, lower, 0.0), None)
    tl.store(diagonal + pid * C + i, on_diagonal)
    if BETA != 0:
        tl.store(d_strength + rows * HV + head, d_beta, mask=valid)


@triton.jit
def pair_gradients(
    q_row, key, strength, e_row, a, d_scores, d_lower,
    ERASE: tl.constexpr, PRE: tl.constexpr, C: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return the gradients of queries, erase keys and keys [C, B] through both squares, given the squares' gradients.

    Walks the joins of the forward again, on the decay factors alone: at every length the second block's rows meet the
    first block's keys, each with its factor, all of them <= 1. Returns the last factors too, exp(G), exp(G'),
    exp(G_C - G). A loop of one body: unrolled, the products of every length would wait in registers.
    """
    f_row, f_erase, f_key = a, a, tl.full([C, B], 1.0, tl.float32)
    if PRE:
        f_erase = f_key
    g_q, g_e, g_k = tl.zeros([C, B], tl.float32), tl.zeros([C, B], tl.float32), tl.zeros([C, B], tl.float32)
    for level in tl.range(levels(C), num_stages=1):
        # Keeps the squares in cache: without it they are loaded before the loop, into registers.
        tl.debug_barrier()
        keys = key * f_key
        g_q += f_row * dot(joined(d_scores, level, False, C), keys, WIDE)
        g_k += f_key * dot(joined(d_scores, level, True, C), q_row * f_row, WIDE)
        if ERASE != NOTHING:
            g_e += f_erase * dot(joined(d_lower, level, False, C), keys, WIDE)
            erase = e_row * f_erase
            if ERASE == WEIGHED:
                erase = (strength[:, None] * f_erase) * key
            g_k += f_key * dot(joined(d_lower, level, True, C), erase, WIDE)
        f_row, to_start, to_end = join(f_row, level, C, B)
        f_key *= to_end
        if PRE:
            f_erase *= to_start
        else:
            f_erase = f_row
    return g_q, g_e, g_k, f_row, f_erase, f_key


@triton.jit
def square_gradients(row, key, square, decays, C: tl.constexpr, WIDE: tl.constexpr):
    """Return the gradients of rows and keys for one decay a head, whose factors [C, C] stand outside the sums."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    forth = tl.load(square + i * C + j).to(tl.float32) * decays
    back = tl.load(square + j * C + i).to(tl.float32) * tl.trans(decays)
    return dot(forth, key, WIDE), dot(back, row, WIDE)


@triton.jit
def factor_gradients(
    written, states, d_states, d_o, d_z,
    rows, valid, head, HV, pid, c,
    ERASE: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Return dq~ = dO S^T, de~ = -dz S^T and dk^ = R dS'^T, [C, B] each, and sum_v S dS', [B], for channels c."""
    i = tl.arange(0, C)
    d_q, d_e, d_k = tl.zeros([C, B], tl.float32), tl.zeros([C, B], tl.float32), tl.zeros([C, B], tl.float32)
    tail = tl.zeros([B], tl.float32)
    for block in range((V + BV - 1) // BV):
        v = block * BV + tl.arange(0, BV)
        at, columns = (pid * C + i[:, None]) * V + v[None, :], (v < V)[None, :]
        cell, inside = (pid * K + c[None, :]) * V + v[:, None], (v < V)[:, None] & (c < K)[None, :]
        state = tl.load(states + cell, mask=inside, other=0.0)
        d_state = tl.load(d_states + cell, mask=inside, other=0.0)
        d_q += dot(load_values(d_o, rows, valid, head, HV, v, V), state, WIDE)
        d_k += dot(tl.load(written + at, mask=columns, other=0.0), d_state, WIDE)
        if ERASE != NOTHING:
            d_e -= dot(tl.load(d_z + at, mask=columns, other=0.0), state, WIDE)
        tail += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 0)
    return d_q, d_e, d_k, tail


@triton.jit
def gate_gradients(u, rate, bound, d_decay, inside, GATE: tl.constexpr):
    """Return the gradients of the gate's logits and of log(rate) before they are summed, [C, B] each."""
    if GATE == SOFTPLUS:
        d_u = -rate * tl.sigmoid(u) * d_decay
        d_rate = d_decay * -rate * softplus(u)
    else:
        d_u = rate * bound * tl.sigmoid(rate * u) * tl.sigmoid(-rate * u) * d_decay
        d_rate = d_u * u
    return tl.where(inside, d_u, 0.0), tl.where(inside, d_rate, 0.0)


@triton.jit(do_not_specialize=["bound", "beta_scale", "scale", "N", "H", "HV", "HE", "tokens"])
def collect_kernel(
    q, k, e, g, beta, A_log, dt_bias,
    cu_seqlens, first, owner,
    written, states, d_o, d_z, d_states, d_scores, d_lower, diagonal, norms,
    d_q, d_k, d_e, d_g, d_strength, d_decay_parts, d_rate, d_bias,
    bound, beta_scale, scale,
    N, H, HV, HE, tokens,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, B: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    NORM: tl.constexpr, GATE: tl.constexpr, BETA: tl.constexpr, ERASE: tl.constexpr,
    SCALAR: tl.constexpr, PRE: tl.constexpr, HAS_RATE: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write the gradients of B channels of one chunk and value head, those of q and k by the normalised ones.

    What is a sum over channels, or over chunks, is written in parts. Grid: blocks of channels * HV * chunks, blocks
    innermost. In a loop over the blocks the addresses of the squares would be kept across it, and registers spill.
    """
    BLOCKS: tl.constexpr = KP // B
    block = tl.program_id(0) % BLOCKS
    pid = tl.program_id(0).to(tl.int64) // BLOCKS
    chunk, head = pid // HV, pid % HV
    if tl.load(owner + chunk) >= N:
        return
    rows, valid = chunk_rows(cu_seqlens, first, owner, chunk, C)
    key_head, erase_head = head // (HV // H), head // (HV // HE)
    i, c = tl.arange(0, C), block * B + tl.arange(0, B)
    strength, q_root, k_root = tl.zeros([C], tl.float32), scale, 1.0
    if BETA != 0:
        strength = write_strength(beta, rows, valid, head, HV, beta_scale, BETA)
    if NORM:
        q_root = scale * tl.load(norms + pid * 2 * C + i)[:, None]
        k_root = tl.load(norms + pid * 2 * C + C + i)[:, None]
    q_row = load_rows(q, rows, valid, key_head, H, c, K) * q_root
    k_row = load_rows(k, rows, valid, key_head, H, c, K) * k_root
    e_row = k_row
    if ERASE == GIVEN:
        e_row = load_rows(e, rows, valid, erase_head, HE, c, K)
    elif ERASE != NOTHING:
        e_row = strength[:, None] * k_row
    dp_at, dl_at = d_scores + pid * C * C, d_lower
    if ERASE != NOTHING:
        dl_at = d_lower + pid * C * C
    rate = head_rate(A_log, head, HAS_RATE)
    if SCALAR:
        post, pre, f_row, f_erase, f_key = decay_matrices(g, rows, valid, head, HV, C, PRE)
        g_q, g_k = square_gradients(q_row, k_row, dp_at, post, C, WIDE)
        g_e = tl.zeros([C, B], tl.float32)
        if ERASE != NOTHING:
            g_e, g_more = square_gradients(e_row, k_row, dl_at, pre, C, WIDE)
            g_k += g_more
    else:
        a = tl.exp(load_log_decay(g, dt_bias, rate, bound, rows, valid, head, HV, c, K, GATE, HAS_BIAS))
        g_q, g_e, g_k, f_row, f_erase, f_key = pair_gradients(
            q_row, k_row, strength, e_row, a, dp_at, dl_at, ERASE, PRE, C, B, WIDE
        )
    # Barriers keep the compiler from starting the next part's loads while this one's tiles fill the registers.
    tl.debug_barrier()
    d_q_factor, d_e_factor, d_k_factor, tail = factor_gradients(
        written, states, d_states, d_o, d_z, rows, valid, head, HV, pid, c, ERASE, K, V, BV, B, C, WIDE
    )
    tl.debug_barrier()
    # Loaded again instead of kept.
    q_row = load_rows(q, rows, valid, key_head, H, c, K) * q_root
    k_row = load_rows(k, rows, valid, key_head, H, c, K) * k_root
    to_end = f_key * d_k_factor
    g_q, g_k = g_q + f_row * d_q_factor, g_k + to_end
    last = tl.sum(k_row * to_end, 0) + tl.sum(tl.where((i == C - 1)[:, None], f_row, 0.0), 0) * tail
    d_decay = q_row * g_q - k_row * g_k
    # The terms i = j, which know no decay.
    same = tl.load(diagonal + pid * C + i)[:, None]
    out = valid[:, None] & (c < K)[None, :]
    at = (rows[:, None] * HV + head) * K + c[None, :]
    save(d_q + at, scale * (g_q + same * k_row), out)
    g_k += same * q_row
    part = (block * tokens.to(tl.int64) + rows) * HV + head
    erased = tl.zeros([C, B], tl.float32)
    if ERASE == GIVEN:
        g_e += f_erase * d_e_factor
        erased = load_rows(e, rows, valid, erase_head, HE, c, K) * g_e
        save(d_e + at, g_e, out)
    elif ERASE != NOTHING:
        g_e += f_erase * d_e_factor
        read = k_row * g_e
        erased = strength[:, None] * read
        tl.store(d_strength + tokens.to(tl.int64) * HV + part, tl.sum(read, 1), mask=valid)
        g_k += strength[:, None] * g_e
    save(d_k + at, g_k, out)
    if SCALAR:
        through_rows = tl.cumsum(tl.sum(d_decay + erased, 1), 0, reverse=True) + tl.sum(last, 0)
        if PRE:
            through_rows -= tl.sum(erased, 1)
        tl.store(d_decay_parts + part, through_rows, mask=valid)
    else:
        d_decay = tl.cumsum(d_decay + erased, 0, reverse=True) + last[None, :]
        if PRE:
            d_decay -= erased
        u = gate_input(g, dt_bias, rows, valid, head, HV, c, K, HAS_BIAS)
        gone = tl.exp(log_decay(u, rate, bound, GATE)) < forgotten(WIDE)
        d_decay = tl.where(gone, 0.0, d_decay)
        if GATE == 0:
            save(d_g + at, d_decay, out)
        else:
            d_u, d_rate_row = gate_gradients(u, rate, bound, d_decay, out, GATE)
            save(d_g + at, d_u, out)
            tl.store(d_rate + pid * BLOCKS + block, tl.sum(tl.sum(d_rate_row, 1), 0))
            tl.store(d_bias + pid * KP + c, tl.sum(d_u, 0))


@triton.jit(do_not_specialize=["count"])
def finish_kernel(
    x, d_parts, d_x, count,
    GROUP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Sum a group's value heads, in order, and go back through the norm: dx = r (dy - y (y dy)).

    Grid: blocks of ROWS of the `count` rows (token, key head).
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, KP)
    mask = (row < count)[:, None] & (c < K)[None, :]
    d_y = tl.zeros([ROWS, KP], tl.float32)
    for member in tl.static_range(0, GROUP):
        at = (row * GROUP + member)[:, None] * K + c[None, :]
        d_y += tl.load(d_parts + at, mask=mask, other=0.0).to(tl.float32)
    at = row[:, None] * K + c[None, :]
    if NORM:
        y = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        root = tl.rsqrt(tl.sum(y * y, 1) + NORM_EPS)[:, None]
        y = y * root
        d_y = root * (d_y - y * tl.sum(y * d_y, 1)[:, None])
    save(d_x + at, d_y, mask)
