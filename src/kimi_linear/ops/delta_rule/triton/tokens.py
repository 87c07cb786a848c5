"""A few tokens a sequence, one after the other with the state in registers: short prompts, and drafts to be verified.

One program a sequence, value head and block of value channels, as in `decode.py`, whose steps these are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_linear.ops.delta_rule.triton.decode import (
    advance,
    blocks,
    form_token,
    load_gate,
    load_row,
    load_token,
    step_token,
)
from kimi_linear.ops.delta_rule.triton.inputs import Inputs
from kimi_linear.ops.triton.device import save
from kimi_linear.ops.triton.launch import start

# Up to here a walk has no more dependent steps than the chunk kernels' joins, solve and chain, and no workspace.
SHORT = 32


@triton.jit(do_not_specialize=["bound", "beta_scale", "scale", "T", "H", "HV", "HE", "SLOTS"])
def tokens_kernel(
    q, k, e, value, g, beta, A_log, dt_bias, states, slots, o, final, trace_decay, trace_key, trace_written,
    bound, beta_scale, scale,
    T, H, HV, HE, SLOTS, slot_stride, head_stride, row_stride, column_stride,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
    NORM: tl.constexpr, GATE: tl.constexpr, BETA: tl.constexpr, ERASE: tl.constexpr,
    SCALAR: tl.constexpr, PRE: tl.constexpr, HAS_RATE: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
    HAS_INITIAL: tl.constexpr, TRACE: tl.constexpr,
):  # fmt: skip
    """`decode_kernel` for T >= 1 tokens [sequences, T], from states that are left as they are.

    Writes o, and the final states [sequences, HV, K, V]; or with TRACE, from the states of the named slots of a pool,
    each token's decay, key and written value; all zero without a slot. Grid: value blocks * HV * sequences, value
    blocks innermost.
    """
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0).to(tl.int64)
    row = pid // BLOCKS
    sequence, head = row // HV, row % HV
    c, v = tl.arange(0, KP), (pid % BLOCKS) * BV + tl.arange(0, BV)
    inside = (c < K)[:, None] & (v < V)[None, :]
    # Only one of the programs that share a decay or a key keeps it.
    first = pid % BLOCKS == 0
    leads = first & (head % (HV // H) == 0)
    slot, live = sequence, head >= 0
    if TRACE:
        slot = tl.load(slots + sequence).to(tl.int64)
        live = (slot >= 0) & (slot < SLOTS)
    state = tl.zeros([KP, BV], tl.float32)
    if HAS_INITIAL:
        cell = c.to(tl.int64)[:, None] * row_stride + v[None, :] * column_stride
        state = tl.load(states + slot * slot_stride + head * head_stride + cell, mask=inside & live, other=0.0)
        state = state.to(tl.float32)
    gate = load_gate(A_log, dt_bias, head, c, K, HAS_RATE, HAS_BIAS)
    at = sequence * T
    given = load_token(q, k, e, value, g, beta, at, head, H, HV, HE, c, v, K, V, BETA, ERASE, SCALAR)
    for t in range(T):
        token = form_token(*given, *gate, bound, beta_scale, NORM, GATE, BETA, ERASE, PRE)
        # The next token is on its way while this one is worked on.
        after = at + tl.minimum(t + 1, T - 1)
        given = load_token(q, k, e, value, g, beta, after, head, H, HV, HE, c, v, K, V, BETA, ERASE, SCALAR)
        state, y, written = step_token(state, *token, ERASE)
        here = (at + t) * HV + head
        if TRACE:
            y = tl.where(live, y, 0.0)
            save(trace_written + here * V + v, tl.where(live, written, 0.0), v < V)
            key_row = (at + t) * H + head // (HV // H)
            save(trace_key + key_row * K + c, tl.where(live, token[1], 0.0), (c < K) & leads)
            if SCALAR:
                save(trace_decay + here + c, tl.where(live, token[4], 0.0), (c < 1) & first)
            else:
                save(trace_decay + here * K + c, tl.where(live, token[4], 0.0), (c < K) & first)
        save(o + here * V + v, scale * y, v < V)
    if not TRACE:
        tl.store(final + row * K * V + c[:, None] * V + v[None, :], state, mask=inside)


@triton.jit(do_not_specialize=["T", "H", "HV", "SLOTS"])
def replay_kernel(
    decay, key, written, accepted, pool, slots,
    T, H, HV, SLOTS, slot_stride, head_stride, row_stride, column_stride,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, SCALAR: tl.constexpr,
):  # fmt: skip
    """S <- a S + k w for the accepted tokens of a trace, in place; nothing without any, or without a slot.

    Grid: value blocks * HV * sequences, value blocks innermost.
    """
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0).to(tl.int64)
    row = pid // BLOCKS
    sequence, head = row // HV, row % HV
    c, v = tl.arange(0, KP), (pid % BLOCKS) * BV + tl.arange(0, BV)
    slot = tl.load(slots + sequence).to(tl.int64)
    count = tl.maximum(tl.minimum(tl.load(accepted + sequence), T), 0).to(tl.int32)
    if (slot < 0) | (slot >= SLOTS) | (count == 0):
        return
    cell = slot * slot_stride + head * head_stride + c.to(tl.int64)[:, None] * row_stride + v[None, :] * column_stride
    inside = (c < K)[:, None] & (v < V)[None, :]
    state = tl.load(pool + cell, mask=inside, other=0.0).to(tl.float32)
    for t in range(count):
        here = (sequence * T + t) * HV + head
        if SCALAR:
            a = tl.load(decay + here) + tl.zeros([KP], tl.float32)
        else:
            a = load_row(decay, here, c, K)
        key_row = load_row(key, (sequence * T + t) * H + head // (HV // H), c, K)
        state = advance(state, a, key_row, load_row(written, here, v, V))
    save(pool + cell, state, inside)


def suits(T: int, cu_seqlens: Tensor | None) -> bool:
    """Return whether a forward walks its tokens instead of cutting them into chunks: by shape alone."""
    return cu_seqlens is None and T <= SHORT


def forward(inputs: Inputs, B: int, T: int) -> tuple[Tensor, Tensor]:
    """Return o [tokens, HV, V] and the final states [B, HV, K, V], in one launch without workspace."""
    K, (HV, V) = inputs.q.shape[2], inputs.value.shape[1:]
    o = torch.empty_like(inputs.value)
    shape = (B, HV, K, V)
    if T == 0:
        initial = inputs.initial
        return o, o.new_zeros(shape, dtype=torch.float32) if initial is None else initial.clone()
    final = torch.empty(shape, dtype=torch.float32, device=o.device)
    _start(inputs, T, (inputs.initial, None), (o, final, None, None, None), (B, HV * K * V, K * V, V, 1))
    return o, final


def verify(inputs: Inputs, pool: Tensor, slots: Tensor, T: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return o and the trace's decay, key and written value, [N * T, ..], from the named states, which stay."""
    rows, value, wide = inputs.q.shape[0], inputs.value, torch.float32
    o, decay = torch.empty_like(value), torch.empty_like(inputs.g, dtype=wide)
    key, written = torch.empty_like(inputs.k, dtype=wide), torch.empty_like(value, dtype=wide)
    if rows:
        _start(inputs, T, (pool, slots), (o, None, decay, key, written), (*pool.shape[:1], *pool.stride()))
    return o, decay, key, written


def _start(
    inputs: Inputs,
    T: int,
    states: tuple[Tensor | None, Tensor | None],
    results: tuple[Tensor | None, ...],
    layout: tuple[int, ...],
) -> None:
    x, (H, HV, HE) = inputs, inputs.heads
    tile, rows = blocks(x.q.shape[2], x.value.shape[2]), x.q.shape[0] // T * HV
    start(
        *(tokens_kernel, rows * -(-tile["V"] // tile["BV"])),
        *(x.q, x.k, x.erase, x.value, x.g, x.beta, x.A_log, x.dt_bias, *states, *results),
        *(x.lower_bound or 0.0, x.beta_scale, x.scale),
        *(T, H, HV, HE, *layout),
        **tile,
        **x.flags,
        HAS_INITIAL=states[0] is not None,
        TRACE=states[1] is not None,
    )


def replay(decay: Tensor, key: Tensor, written: Tensor, accepted: Tensor, pool: Tensor, slots: Tensor) -> None:
    """Advance the named states by the accepted tokens of a trace [N, T, ..], in place; the host reads nothing."""
    N, T, H, K = key.shape
    HV, V = written.shape[2:]
    tile = blocks(K, V)
    start(
        *(replay_kernel, N * HV * -(-V // tile["BV"])),
        *(decay, key, written, accepted, pool, slots, T, H, HV, *pool.shape[:1], *pool.stride()),
        **tile,
        SCALAR=decay.dim() == 3,
    )
