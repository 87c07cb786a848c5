"""One token a sequence, in place on a pool of states: one program a sequence, value head and block of values."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_linear.ops.delta_rule.triton.device import log_decay
from kimi_linear.ops.delta_rule.triton.inputs import Inputs
from kimi_linear.ops.delta_rule.triton.prepare import GIVEN, LOGIT, NORM_EPS, NOTHING, WEIGHED, head_rate
from kimi_linear.ops.triton.device import save
from kimi_linear.ops.triton.launch import padded, start

# Value channels a program takes, whatever the batch: so no neighbour changes a bit.
BLOCK = 32


@triton.jit
def load_row(x, row, c, dim: tl.constexpr):
    """Return channels c of one row of x [rows, dim] as float32, zero outside."""
    return tl.load(x + row * dim + c, mask=c < dim, other=0.0).to(tl.float32)


@triton.jit
def load_token(
    q, k, e, value, g, beta, token, head, H, HV, HE, c, v,
    K: tl.constexpr, V: tl.constexpr, BETA: tl.constexpr, ERASE: tl.constexpr, SCALAR: tl.constexpr,
):  # fmt: skip
    """Return one token of a value head as it is given: q, k, e (k without one), value, g and beta, float32."""
    row, key_row = token * HV + head, token * H + head // (HV // H)
    q_row, k_row = load_row(q, key_row, c, K), load_row(k, key_row, c, K)
    e_row = k_row
    if ERASE == GIVEN:
        e_row = load_row(e, token * HE + head // (HV // HE), c, K)
    if SCALAR:
        u = tl.load(g + row).to(tl.float32) + tl.zeros(c.shape, tl.float32)
    else:
        u = load_row(g, row, c, K)
    b = tl.full((), 1.0, tl.float32)
    if BETA != 0:
        b = tl.load(beta + row).to(tl.float32)
    return q_row, k_row, e_row, load_row(value, row, v, V), u, b


@triton.jit
def load_gate(A_log, dt_bias, head, c, K: tl.constexpr, HAS_RATE: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Return a head's rate and the bias of its gate's channels c."""
    bias = tl.zeros(c.shape, tl.float32)
    if HAS_BIAS:
        bias = load_row(dt_bias, head, c, K)
    return tl.zeros((), tl.float32) + head_rate(A_log, head, HAS_RATE), bias


@triton.jit
def form_token(
    q_row, k_row, e_row, z, u, b, rate, bias, bound, beta_scale,
    NORM: tl.constexpr, GATE: tl.constexpr, BETA: tl.constexpr, ERASE: tl.constexpr, PRE: tl.constexpr,
):  # fmt: skip
    """Return what `step_token` takes: q, k, the erase key a e (e for a read before the decay), z, and the decay a."""
    if NORM:
        q_row *= tl.rsqrt(tl.sum(q_row * q_row, 0) + NORM_EPS)
        k_row *= tl.rsqrt(tl.sum(k_row * k_row, 0) + NORM_EPS)
    if GATE != 0:
        u = log_decay(u + bias, rate, bound, GATE)
    decay = tl.exp(u)
    if BETA == LOGIT:
        b = beta_scale * tl.sigmoid(b)
    if BETA != 0:
        z *= b
    if ERASE == WEIGHED:
        e_row = b * k_row
    if not PRE:
        e_row *= decay
    return q_row, k_row, e_row, z, decay


@triton.jit
def advance(state, decay, key, written):
    """Return a S + k w. The addition is fused by name, so that every kernel rounds alike."""
    return tl.fma(key[:, None], written[None, :], decay[:, None] * state)


@triton.jit
def step_token(state, q_row, k_row, e_row, z, decay, ERASE: tl.constexpr):
    """x = e S, y = (a q) S, w = z - x; return the state a S + k w, y + (q k) w, and w."""
    written = z
    if ERASE != NOTHING:
        written = z - tl.sum(e_row[:, None] * state, 0)
    y = tl.sum((decay * q_row)[:, None] * state, 0) + tl.sum(q_row * k_row, 0) * written
    return advance(state, decay, k_row, written), y, written


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
    gate = load_gate(A_log, dt_bias, head, c, K, HAS_RATE, HAS_BIAS)
    given = load_token(q, k, e, value, g, beta, sequence, head, H, HV, HE, c, v, K, V, BETA, ERASE, SCALAR)
    token = form_token(*given, *gate, bound, beta_scale, NORM, GATE, BETA, ERASE, PRE)
    cell = slot * slot_stride + head * head_stride + c.to(tl.int64)[:, None] * row_stride + v[None, :] * column_stride
    inside = (c < K)[:, None] & (v < V)[None, :]
    state = tl.load(pool + cell, mask=inside, other=0.0).to(tl.float32)
    state, y, _ = step_token(state, *token, ERASE)
    save(pool + cell, state, inside)
    save(to, scale * y, v < V)


def blocks(K: int, V: int) -> dict[str, int]:
    """Return the tile of a state that a program holds, and its warps.

    Asked for registers, the assembler spills none; left alone it spills one or two to fit one more program in.
    """
    tile = {"K": K, "V": V, "KP": padded(K), "BV": min(padded(V), BLOCK)}
    return {**tile, "num_warps": 4, "maxnreg": 255}


def decode(inputs: Inputs, pool: Tensor, slots: Tensor) -> Tensor:
    """Advance the named states by one token; return o [N, HV, V]. Safe in a CUDA graph: the host reads nothing."""
    N, H, K = inputs.q.shape
    HV, V = inputs.value.shape[1:]
    o = torch.empty_like(inputs.value)
    tile = blocks(K, V)
    start(
        *(decode_kernel, N * HV * -(-V // tile["BV"])),
        *(inputs.q, inputs.k, inputs.erase, inputs.value, inputs.g, inputs.beta, inputs.A_log, inputs.dt_bias),
        *(pool, slots, o, inputs.lower_bound or 0.0, inputs.beta_scale, inputs.scale),
        *(H, HV, inputs.heads[2], *pool.shape[:1], *pool.stride()),
        **tile,
        **inputs.flags,
    )
    return o
