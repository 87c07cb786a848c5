"""One token a sequence through a whole layer between its projections: one program a sequence and key head.

A program owns its key head's channels of every history, and all value heads of the group, so that each history is
read and shifted by one program alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_linear.ops.delta_rule.triton.decode import load_row
from kimi_linear.ops.delta_rule.triton.device import log_decay
from kimi_linear.ops.delta_rule.triton.prepare import NORM_EPS, head_rate
from kimi_linear.ops.triton.device import narrow, save
from kimi_linear.ops.triton.launch import padded, start

# Elements of a state that a program holds at a time, to 128 channels of keys and above: 64 and 32 registers of each
# thread of 8 warps. The rows of q, k and the decay take as many again, the more the more keys there are.
TILE, WIDE_TILE = 16384, 8192
# Up to so many elements 4 warps hold in 32 registers of each thread.
SMALL_TILE = 4096


@triton.jit
def window(
    x, weight, history, x_at, channel, inside, slot_at, channel_stride, tap_stride, W: tl.constexpr, TP: tl.constexpr
):
    """Return the channels' inputs, the W - 1 before them [C, TP], and silu of the sum over taps, rounded as x is."""
    now = tl.load(x + x_at, mask=inside, other=0.0).to(tl.float32)
    y = now * tl.load(weight + channel * W + (W - 1), mask=inside, other=0.0).to(tl.float32)
    past = now[:, None]
    if W > 1:
        tap = tl.arange(0, TP)[None, :]
        known = inside[:, None] & (tap < W - 1)
        at = slot_at + channel[:, None] * channel_stride + tap * tap_stride
        past = tl.load(history + at, mask=known, other=0.0).to(tl.float32)
        y += tl.sum(past * tl.load(weight + channel[:, None] * W + tap, mask=known, other=0.0).to(tl.float32), 1)
    return now, past, narrow(y * tl.sigmoid(y), x.dtype.element_ty).to(tl.float32)


@triton.jit
def shift(
    history, now, past, channel, inside, slot_at, channel_stride, tap_stride, W: tl.constexpr, TP: tl.constexpr
):  # fmt: skip
    """Move the channels' histories on by one token, oldest first."""
    if W > 1:
        tap = tl.arange(0, TP)[None, :]
        at = slot_at + channel[:, None] * channel_stride + (tap - 1) * tap_stride
        save(history + at, past, inside[:, None] & (tap > 0) & (tap < W - 1))
        save(history + slot_at + channel * channel_stride + (W - 2) * tap_stride, now, inside)


@triton.jit(do_not_specialize=["bound", "beta_scale", "scale", "eps", "H", "SLOTS"])
def layer_token_kernel(
    q, k, value, g, beta, output_gate, weight_q, weight_k, weight_v, A_log, dt_bias, norm,
    pool_q, pool_k, pool_v, pool, slots, o,
    bound, beta_scale, scale, eps, H, SLOTS,
    slot_q, channel_q, tap_q, slot_k, channel_k, tap_k, slot_v, channel_v, tap_v,
    slot_stride, head_stride, row_stride, column_stride,
    K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr,
    KP: tl.constexpr, BV: tl.constexpr, BP: tl.constexpr, TP: tl.constexpr,
    GATE: tl.constexpr, HAS_RATE: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Convolve q, k and v, advance the states of the group, norm and gate what they give.

    State and output as in `decode.decode_kernel`. What the layer's operators would write to memory in between is
    rounded here as they round it: y of the convolutions to the dtype of their inputs, o to its own before its norm.
    All of a step's loads stand before a barrier and its stores behind it, because a small tile is held by several
    threads, one of which stores what another loads. Grid: H * sequences.
    """
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0).to(tl.int64)
    sequence, head = pid // H, pid % H
    c, v, part = tl.arange(0, KP), tl.arange(0, BV), tl.arange(0, BP)
    value_channel = part[:, None] * BV + v[None, :]
    slot = tl.load(slots + sequence).to(tl.int64)
    if (slot < 0) | (slot >= SLOTS):
        for i in range(GROUP):
            to = o + (pid * GROUP + i) * V + value_channel
            save(to, tl.zeros([BP, BV], tl.float32), value_channel < V)
        return
    key_at, q_at, k_at = head * K + c, slot * slot_q, slot * slot_k
    q_now, q_past, q_row = window(q, weight_q, pool_q, pid * K + c, key_at, c < K, q_at, channel_q, tap_q, W, TP)
    k_now, k_past, k_row = window(k, weight_k, pool_k, pid * K + c, key_at, c < K, k_at, channel_k, tap_k, W, TP)
    q_row *= tl.rsqrt(tl.sum(q_row * q_row, 0) + NORM_EPS)
    k_row *= tl.rsqrt(tl.sum(k_row * k_row, 0) + NORM_EPS)
    q_times_k = tl.sum(q_row * k_row, 0)
    for i in range(GROUP):
        row, value_head = pid * GROUP + i, head * GROUP + i
        u = load_row(g, row, c, K)
        if HAS_BIAS:
            u += load_row(dt_bias, value_head, c, K)
        decay = tl.exp(log_decay(u, head_rate(A_log, value_head, HAS_RATE), bound, GATE))
        strength = beta_scale * tl.sigmoid(tl.load(beta + row).to(tl.float32))
        z = load_row(output_gate, row, value_channel, V)
        gain = load_row(norm, 0, value_channel, V)
        heads_o = tl.zeros([BP, BV], tl.float32)
        for block in range(BLOCKS):
            w = block * BV + v
            cell = slot * slot_stride + value_head * head_stride
            cell += c.to(tl.int64)[:, None] * row_stride + w[None, :] * column_stride
            inside = (c < K)[:, None] & (w < V)[None, :]
            state = tl.load(pool + cell, mask=inside, other=0.0).to(tl.float32)
            value_at, v_at = value_head * V + w, slot * slot_v
            v_now, v_past, v_row = window(
                value, weight_v, pool_v, row * V + w, value_at, w < V, v_at, channel_v, tap_v, W, TP
            )
            tl.debug_barrier()
            shift(pool_v, v_now, v_past, value_at, w < V, v_at, channel_v, tap_v, W, TP)
            written = strength * v_row - tl.sum((strength * decay * k_row)[:, None] * state, 0)
            y = tl.sum((decay * q_row)[:, None] * state, 0) + q_times_k * written
            save(pool + cell, decay[:, None] * state + k_row[:, None] * written[None, :], inside)
            y = narrow(scale * y, o.dtype.element_ty).to(tl.float32)
            heads_o = tl.where((part == block)[:, None], y[None, :], heads_o)
        rms = tl.rsqrt(tl.sum(tl.sum(heads_o * heads_o, 1), 0) / V + eps)
        opened = tl.sigmoid(z)
        if SILU:
            opened *= z
        save(o + row * V + value_channel, heads_o * rms * gain * opened, value_channel < V)
    shift(pool_q, q_now, q_past, key_at, c < K, q_at, channel_q, tap_q, W, TP)
    shift(pool_k, k_now, k_past, key_at, c < K, k_at, channel_k, tap_k, W, TP)


def tiles(K: int, V: int) -> tuple[int, int, int]:
    """Return the value channels a program takes at a time, in how many parts, and its warps."""
    keys, values = padded(K), padded(V)
    block = min(values, max(16, (TILE if keys <= 128 else WIDE_TILE) // keys))
    return block, values // block, 4 if keys * block <= SMALL_TILE else 8


def layer_token(
    rows: tuple[Tensor, ...],
    weights: tuple[Tensor | None, ...],
    pools: tuple[Tensor, ...],
    slots: Tensor,
    lower_bound: float | None,
    beta_scale: float,
    scale: float,
    eps: float,
    silu: bool,
) -> Tensor:
    """Advance the named sequences by one token; return y [N, HV, V]. Safe in a CUDA graph: the host reads nothing.

    rows: q, k [N, H, K], v [N, HV, V], gate [N, HV, K], beta [N, HV], output gate [N, HV, V], contiguous. weights: the
    taps [D, W] of q, k and v, A_log, dt_bias, the norm's [V], contiguous. pools: histories of q, k and v, states.
    """
    (N, H, K), (HV, V) = rows[0].shape, rows[2].shape[1:]
    W, o = pools[0].shape[2] + 1, torch.empty_like(rows[2])
    block, parts, warps = tiles(K, V)
    histories = [stride for pool in pools[:3] for stride in pool.stride()]
    start(
        *(layer_token_kernel, N * H),
        *(*rows, *weights, *pools, slots, o, lower_bound or 0.0, beta_scale, scale, eps, H),
        *(pools[3].shape[0], *histories, *pools[3].stride()),
        K=K,
        V=V,
        W=W,
        GROUP=HV // H,
        KP=padded(K),
        BV=block,
        BP=parts,
        TP=triton.next_power_of_2(max(1, W - 1)),
        GATE=1 if lower_bound is None else 2,
        HAS_RATE=weights[3] is not None,
        HAS_BIAS=weights[4] is not None,
        SILU=silu,
        num_warps=warps,
    )
    return o
