"""One token a sequence, in place on a pool of states: one program a sequence, value head and block of values."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_linear.ops.delta_rule.triton.device import log_decay
from kimi_linear.ops.delta_rule.triton.inputs import Inputs
from kimi_linear.ops.delta_rule.triton.prepare import GIVEN, LOGIT, NORM_EPS, NOTHING, head_rate
from kimi_linear.ops.triton.device import save
from kimi_linear.ops.triton.launch import padded, start

# State-heads from which a program takes 32 value channels at a time; fewer take 16, so that more programs read.
MANY_ROWS = 1024


@triton.jit
def load_row(x, row, c, dim: tl.constexpr):
    """Return channels c of one row of x [rows, dim] as float32, zero outside."""
    return tl.load(x + row * dim + c, mask=c < dim, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["bound", "beta_scale", "scale", "H", "HV", "HE", "SLOTS"])
def decode_kernel(
    q, k, e, value, g, beta, A_log, dt_bias, pool, slots, o,
    bound, beta_scale, scale,
    H, HV, HE, SLOTS, slot_stride, head_stride, row_stride, column_stride,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
    NORM: tl.constexpr, GATE: tl.constexpr, BETA: tl.constexpr, ERASE: tl.constexpr,
    SCALAR: tl.constexpr, PRE: tl.constexpr, HAS_RATE: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """x = (a e) S, y = (a q) S, w = z - x, o = scale (y + (q k) w), S <- a S + k w, with a = exp(g).

    The state is read once and written once; without a slot of the pool o is zero. Grid: value blocks * HV *
    sequences, value blocks innermost.
    """
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0).to(tl.int64)
    row = pid // BLOCKS
    sequence, head = row // HV, row % HV
    c, v = tl.arange(0, KP), (pid % BLOCKS) * BV + tl.arange(0, BV)
    to = o + row * V + v
    slot = tl.load(slots + sequence).to(tl.int64)
    if (slot < 0) | (slot >= SLOTS):
        save(to, tl.zeros([BV], tl.float32), v < V)
        return
    key_row = sequence * H + head // (HV // H)
    q_row, k_row = load_row(q, key_row, c, K), load_row(k, key_row, c, K)
    if NORM:
        q_row *= tl.rsqrt(tl.sum(q_row * q_row, 0) + NORM_EPS)
        k_row *= tl.rsqrt(tl.sum(k_row * k_row, 0) + NORM_EPS)
    if SCALAR:
        decay = tl.exp(tl.load(g + row).to(tl.float32)) + tl.zeros([KP], tl.float32)
    else:
        u = load_row(g, row, c, K)
        if HAS_BIAS:
            u += load_row(dt_bias, head, c, K)
        if GATE != 0:
            u = log_decay(u, head_rate(A_log, head, HAS_RATE), bound, GATE)
        decay = tl.exp(u)
    z = load_row(value, row, v, V)
    e_row = k_row
    if BETA != 0:
        strength = tl.load(beta + row).to(tl.float32)
        if BETA == LOGIT:
            strength = beta_scale * tl.sigmoid(strength)
        z *= strength
        e_row = strength * k_row
    if ERASE == GIVEN:
        e_row = load_row(e, sequence * HE + head // (HV // HE), c, K)
    if not PRE:
        e_row *= decay
    state_at = slot * slot_stride + head * head_stride
    cell = state_at + c.to(tl.int64)[:, None] * row_stride + v[None, :] * column_stride
    inside = (c < K)[:, None] & (v < V)[None, :]
    state = tl.load(pool + cell, mask=inside, other=0.0).to(tl.float32)
    written = z
    if ERASE != NOTHING:
        written = z - tl.sum(e_row[:, None] * state, 0)
    y = tl.sum((decay * q_row)[:, None] * state, 0) + tl.sum(q_row * k_row, 0) * written
    save(pool + cell, decay[:, None] * state + k_row[:, None] * written[None, :], inside)
    save(to, scale * y, v < V)


def decode(inputs: Inputs, pool: Tensor, slots: Tensor) -> Tensor:
    """Advance the named states by one token; return o [N, HV, V]. Safe in a CUDA graph: the host reads nothing."""
    N, H, K = inputs.q.shape
    HV, V = inputs.value.shape[1:]
    o = torch.empty_like(inputs.value)
    block = min(padded(V), 32 if N * HV >= MANY_ROWS else 16)
    start(
        *(decode_kernel, N * HV * -(-V // block)),
        *(inputs.q, inputs.k, inputs.erase, inputs.value, inputs.g, inputs.beta, inputs.A_log, inputs.dt_bias),
        *(pool, slots, o, inputs.lower_bound or 0.0, inputs.beta_scale, inputs.scale),
        *(H, HV, inputs.heads[2], *pool.shape[:1], *pool.stride()),
        K=K,
        V=V,
        KP=padded(K),
        BV=block,
        **inputs.flags,
        num_warps=4,
    )
    return o
