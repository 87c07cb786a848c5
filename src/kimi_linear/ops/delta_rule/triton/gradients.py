"""The gradients of a chunk's scores, then of its channels, once the chains have run; last, group sums and norms."""

import triton
import triton.language as tl

from kimi_linear.ops.delta_rule.triton.device import LEAF, SOFTPLUS, carry, first_and_second, forgotten, softplus
from kimi_linear.ops.delta_rule.triton.prepare import (
    GIVEN,
    NORM_EPS,
    NOTHING,
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
def leaves(square, C: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Return the 16 x 16 blocks on the diagonal of a stored matrix [C, C], or of its transpose, [C / 16, 16, 16]."""
    n, i = tl.arange(0, C // LEAF)[:, None, None] * LEAF, tl.arange(0, LEAF)
    rows, columns = i[None, :, None], i[None, None, :]
    if TRANSPOSED:
        rows, columns = columns, rows
    return tl.load(square + (n + rows) * C + n + columns)


@triton.jit
def through_leaves(
    blocks, x, LENGTH: tl.constexpr, UPPER: tl.constexpr, C: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr
):
    """Return the leaves' product with x [C, B], over the (second, first) blocks of every pair of LENGTH < 16 alone.

    UPPER: over the (first, second) blocks, which a transpose has instead.
    """
    i, j = tl.arange(0, LEAF)[:, None], tl.arange(0, LEAF)[None, :]
    mask = ((i ^ j) // LENGTH == 1) & ((i > j) ^ UPPER)
    chosen = tl.where(mask[None, :, :], blocks, 0.0).to(blocks.dtype)
    x = tl.reshape(x, [C // LEAF, LEAF, B])
    if WIDE:
        # Three tf32 products would hold six fragments in registers; leaves are too small to lose time.
        return tl.reshape(tl.dot(chosen, x, input_precision="ieee"), [C, B])
    return tl.reshape(dot(chosen, x, WIDE), [C, B])


@triton.jit
def through_pairs(square, x, LENGTH: tl.constexpr, UPPER: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr):
    """Return the same for LENGTH >= 16, from the stored matrix [C, C]; UPPER: from its transpose, loaded as such."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    mask = ((i ^ j) // LENGTH == 1) & ((i > j) ^ UPPER)
    at = i * C + j
    if UPPER:
        at = j * C + i
    return dot(tl.load(square + at, mask=mask, other=0.0), x, WIDE)


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
def factor_gradients(
    written, states, d_states, d_o,
    rows, valid, head, HV, pid, c,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, B: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return dq~ = dO S^T and dk^ = R dS'^T, [C, B] each, and sum_v S dS', [B], for channels c."""
    i = tl.arange(0, C)
    d_q, d_k, tail = tl.zeros([C, B], tl.float32), tl.zeros([C, B], tl.float32), tl.zeros([B], tl.float32)
    for block in range((V + BV - 1) // BV):
        v = block * BV + tl.arange(0, BV)
        at, columns = (pid * C + i[:, None]) * V + v[None, :], (v < V)[None, :]
        cell, inside = (pid * K + c[None, :]) * V + v[:, None], (v < V)[:, None] & (c < K)[None, :]
        state = tl.load(states + cell, mask=inside, other=0.0)
        d_state = tl.load(d_states + cell, mask=inside, other=0.0)
        d_q += dot(load_values(d_o, rows, valid, head, HV, v, V), state, WIDE)
        d_k += dot(tl.load(written + at, mask=columns, other=0.0), d_state, WIDE)
        tail += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 0)
    return d_q, d_k, tail


@triton.jit
def erase_factor_gradient(
    states, d_z, pid, c,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, B: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return de~ = -dz S^T, [C, B], for channels c."""
    i, d_e = tl.arange(0, C), tl.zeros([C, B], tl.float32)
    for block in range((V + BV - 1) // BV):
        v = block * BV + tl.arange(0, BV)
        at, columns = (pid * C + i[:, None]) * V + v[None, :], (v < V)[None, :]
        cell, inside = (pid * K + c[None, :]) * V + v[:, None], (v < V)[:, None] & (c < K)[None, :]
        state = tl.load(states + cell, mask=inside, other=0.0)
        d_e -= dot(tl.load(d_z + at, mask=columns, other=0.0), state, WIDE)
    return d_e


@triton.jit
def pair_gradients(
    row, key, a, square, PRE: tl.constexpr, C: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Return the gradients of rows and keys [C, B] through a square of scores, given the gradient of the square.

    Walks the joins of the forward again, on the decay factors alone: at every length the second block's rows meet the
    first block's keys, each with its factor, all of them <= 1. Returns the last factors too, exp(G) or exp(G') and
    exp(G_C - G), and exp(G_C) [1, B].
    """
    f_row, f_key, total = a, tl.full([C, B], 1.0, tl.float32), a
    if PRE:
        f_row = f_key
    g_row, g_key = tl.zeros([C, B], tl.float32), tl.zeros([C, B], tl.float32)
    for level in tl.static_range(0, 6):
        if (1 << level) < C:
            if (1 << level) < LEAF:
                g_row += f_row * through_leaves(leaves(square, C, False), key * f_key, 1 << level, False, C, B, WIDE)
                g_key += f_key * through_leaves(leaves(square, C, True), row * f_row, 1 << level, True, C, B, WIDE)
            else:
                g_row += f_row * through_pairs(square, key * f_key, 1 << level, False, C, WIDE)
                g_key += f_key * through_pairs(square, row * f_row, 1 << level, True, C, WIDE)
            one, two = first_and_second(total, C // (2 << level), B)
            f_row, f_key = carry(f_row, one, 1, C, 1 << level, B), carry(f_key, two, 0, C, 1 << level, B)
            total = one * two
    return g_row, g_key, f_row, f_key, total


@triton.jit
def square_gradients(row, key, square, decays, C: tl.constexpr, WIDE: tl.constexpr):
    """Return the same for one decay a head, whose factors [C, C] stand outside the sums over channels."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    forth = tl.load(square + i * C + j).to(tl.float32) * decays
    back = tl.load(square + j * C + i).to(tl.float32) * tl.trans(decays)
    return dot(forth, key, WIDE), dot(back, row, WIDE)


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
    key_head = head // (HV // H)
    i, c = tl.arange(0, C), block * B + tl.arange(0, B)
    q_row, k_row = load_rows(q, rows, valid, key_head, H, c, K), load_rows(k, rows, valid, key_head, H, c, K)
    if NORM:
        q_row *= tl.load(norms + pid * 2 * C + i)[:, None]
        k_row *= tl.load(norms + pid * 2 * C + C + i)[:, None]
    q_row *= scale
    strength = tl.zeros([C], tl.float32)
    if BETA != 0:
        strength = write_strength(beta, rows, valid, head, HV, beta_scale, BETA)
    e_row = strength[:, None] * k_row
    if ERASE == GIVEN:
        e_row = load_rows(e, rows, valid, head // (HV // HE), HE, c, K)
    dp_at, dl_at = d_scores + pid * C * C, d_lower
    if ERASE != NOTHING:
        dl_at = d_lower + pid * C * C
    if SCALAR:
        post, pre, f_row, f_erase, f_key, f_total = decay_matrices(g, rows, valid, head, HV, C, PRE)
        g_q, g_k = square_gradients(q_row, k_row, dp_at, post, C, WIDE)
    else:
        rate = head_rate(A_log, head, HAS_RATE)
        a = tl.exp(load_log_decay(g, dt_bias, rate, bound, rows, valid, head, HV, c, K, GATE, HAS_BIAS))
        g_q, g_k, f_row, f_key, f_total = pair_gradients(q_row, k_row, a, dp_at, False, C, B, WIDE)
    # Barriers keep the compiler from starting the next part's loads while this one's tiles fill the registers.
    tl.debug_barrier()
    d_q_factor, d_k_factor, tail = factor_gradients(
        written, states, d_states, d_o, rows, valid, head, HV, pid, c, K, V, BV, B, C, WIDE
    )
    to_end = f_key * d_k_factor
    g_q, g_k = g_q + f_row * d_q_factor, g_k + to_end
    last = tl.sum(k_row * to_end, 0) + tl.sum(f_total, 0) * tail
    d_decay = q_row * g_q - k_row * g_k
    # The terms i = j, which know no decay.
    same = tl.load(diagonal + pid * C + i)[:, None]
    out = valid[:, None] & (c < K)[None, :]
    at = (rows[:, None] * HV + head) * K + c[None, :]
    save(d_q + at, scale * (g_q + same * k_row), out)
    g_k += same * q_row
    g_e = tl.zeros([C, B], tl.float32)
    if ERASE != NOTHING:
        if SCALAR:
            g_e, g_more = square_gradients(e_row, k_row, dl_at, pre, C, WIDE)
        else:
            # The same decays again: kept from above, the factors of every length would not fit the registers.
            tl.debug_barrier()
            again = tl.exp(load_log_decay(g, dt_bias, rate, bound, rows, valid, head, HV, c, K, GATE, HAS_BIAS))
            g_e, g_more, f_erase, f_key, f_total = pair_gradients(e_row, k_row, again, dl_at, PRE, C, B, WIDE)
        tl.debug_barrier()
        g_e += f_erase * erase_factor_gradient(states, d_z, pid, c, K, V, BV, B, C, WIDE)
        g_k += g_more
        d_decay -= k_row * g_more
    erased = e_row * g_e
    d_decay = tl.cumsum(d_decay + erased, 0, reverse=True) + last[None, :]
    if PRE:
        d_decay -= erased
    part = (block * tokens.to(tl.int64) + rows) * HV + head
    if SCALAR:
        tl.store(d_decay_parts + part, tl.sum(tl.where(out, d_decay, 0.0), 1), mask=valid)
    else:
        d_decay = tl.where(a < forgotten(WIDE), 0.0, d_decay)
        if GATE == 0:
            save(d_g + at, d_decay, out)
        else:
            u = gate_input(g, dt_bias, rows, valid, head, HV, c, K, HAS_BIAS)
            d_u, d_rate_row = gate_gradients(u, rate, bound, d_decay, out, GATE)
            save(d_g + at, d_u, out)
            tl.store(d_rate + pid * BLOCKS + block, tl.sum(tl.sum(d_rate_row, 1), 0))
            tl.store(d_bias + pid * KP + c, tl.sum(d_u, 0))
    if ERASE == GIVEN:
        save(d_e + at, g_e, out)
    elif ERASE != NOTHING:
        tl.store(d_strength + tokens.to(tl.int64) * HV + part, tl.sum(k_row * g_e, 1), mask=valid)
        g_k += strength[:, None] * g_e
    save(d_k + at, g_k, out)


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
