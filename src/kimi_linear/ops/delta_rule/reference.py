"""The recurrence token by token, and its backward: the definition every other backend is held against.

Kimi Linear, arXiv:2510.26692, Eq. 1, with the erase key and the write value set free of the key and the value.
Letters: S state [N, HV, K, V]; q, k, e (erase key) [B, T, HV, K]; z (write value) [B, T, HV, V]; g (log decay)
[B, T, HV, K]. Good in float64; computes in float32 for every narrower dtype. The backward keeps every state, O(T K V)
memory: it is for checking, not for training.
"""

import torch
from torch import Tensor

from kimi_linear.ops.autocast import without_autocast
from kimi_linear.ops.delta_rule.autograd import register
from kimi_linear.ops.delta_rule.layout import expand_heads, sequence_bounds, sum_heads, wide_dtype


def _decay(log_decay: Tensor) -> Tensor:
    """Return exp(g), [B, T, HV, K], or [B, T, HV, 1] for a scalar decay."""
    return (log_decay if log_decay.dim() == 4 else log_decay.unsqueeze(-1)).exp()


def recurrent_step(
    state: Tensor, q: Tensor, k: Tensor, e: Tensor | None, z: Tensor, decay: Tensor, scale: float, read: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Advance [.., K, V] states by one token: q, k, e, decay [.., K], z [.., V]; returns state, o, written [.., V]."""
    # Eq. 1, first factor: decay every key channel.
    decayed = decay.unsqueeze(-1) * state
    written = z
    if e is not None:
        # What the erase key reads is taken back out: from the decayed state, or from the one before the decay.
        source = decayed if read == "post" else state
        written = z - torch.einsum("...k,...kv->...v", e, source)
    # Eq. 1, rank-one write, then the read after the write.
    state = decayed + k.unsqueeze(-1) * written.unsqueeze(-2)
    return state, scale * torch.einsum("...k,...kv->...v", q, state), written


def recurrent_forward(
    q: Tensor, k: Tensor, e: Tensor | None, z: Tensor, g: Tensor, scale: float, state: Tensor, read: str
) -> tuple[Tensor, Tensor]:
    """Run one batch of equally long sequences; differentiable by autograd. Heads already expanded to HV."""
    decay = _decay(g)
    outputs = []
    for t in range(q.shape[1]):
        e_t = None if e is None else e[:, t]
        state, o, _ = recurrent_step(state, q[:, t], k[:, t], e_t, z[:, t], decay[:, t], scale, read)
        outputs.append(o)
    return (torch.stack(outputs, 1) if outputs else z.new_empty(z.shape)), state


def recurrent_backward(
    d_o: Tensor,
    d_state: Tensor,
    q: Tensor,
    k: Tensor,
    e: Tensor | None,
    z: Tensor,
    g: Tensor,
    scale: float,
    state: Tensor,
    read: str,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Return the gradients of (q, k, e, z, g, initial state), token by token from the last."""
    decay = _decay(g)
    states = [state]
    for t in range(q.shape[1]):
        e_t = None if e is None else e[:, t]
        states.append(recurrent_step(states[-1], q[:, t], k[:, t], e_t, z[:, t], decay[:, t], scale, read)[0])
    d_q, d_k, d_z = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(z)
    d_e = None if e is None else torch.zeros_like(e)
    d_g = torch.zeros_like(g)
    for t in reversed(range(q.shape[1])):
        before, after = states[t], states[t + 1]
        decayed = decay[:, t].unsqueeze(-1) * before
        # o = scale q^T S
        d_state = d_state + scale * q[:, t].unsqueeze(-1) * d_o[:, t].unsqueeze(-2)
        d_q[:, t] = scale * torch.einsum("bhkv,bhv->bhk", after, d_o[:, t])
        # S = decayed + k (z - r)^T
        d_written = torch.einsum("bhk,bhkv->bhv", k[:, t], d_state)
        d_z[:, t] = d_written
        written = z[:, t]
        d_before = torch.zeros_like(before)
        d_decayed = d_state
        if e is not None and d_e is not None:
            source = decayed if read == "post" else before
            written = written - torch.einsum("bhk,bhkv->bhv", e[:, t], source)
            # r = e^T source, dr = -d_written
            d_e[:, t] = -torch.einsum("bhkv,bhv->bhk", source, d_written)
            d_source = -e[:, t].unsqueeze(-1) * d_written.unsqueeze(-2)
            if read == "post":
                d_decayed = d_state + d_source
            else:
                d_before = d_source
        d_k[:, t] = torch.einsum("bhkv,bhv->bhk", d_state, written)
        # decayed = exp(g) S
        d_channel = (d_decayed * decayed).sum(-1)
        d_g[:, t] = d_channel if g.dim() == 4 else d_channel.sum(-1)
        d_state = d_before + decay[:, t].unsqueeze(-1) * d_decayed
    return d_q, d_k, d_e, d_z, d_g, d_state


def _wide(
    q: Tensor, k: Tensor, e: Tensor | None, z: Tensor, g: Tensor, state: Tensor | None, sequences: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Return the inputs in the dtype to compute in, key heads expanded, the initial state made."""
    dtype, heads = wide_dtype(z.dtype), z.shape[2]
    if state is None:
        state = torch.zeros(sequences, heads, q.shape[3], z.shape[3], device=z.device)
    wide_e = None if e is None else expand_heads(e.to(dtype), heads)
    q, k = expand_heads(q.to(dtype), heads), expand_heads(k.to(dtype), heads)
    return q, k, wide_e, z.to(dtype), g.to(dtype), state.to(dtype)


@torch.library.custom_op("kimi_linear::delta_rule_reference", mutates_args=())
def delta_rule_reference(
    q: Tensor,
    k: Tensor,
    erase_key: Tensor | None,
    write_value: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    read: str,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence; see `kimi_linear.ops.delta_rule.delta_rule` for the arguments."""
    bounds = sequence_bounds(cu_seqlens, q)
    *inputs, state = _wide(q, k, erase_key, write_value, log_decay, initial_state, len(bounds))
    o, final = write_value.new_empty(write_value.shape), state.new_empty(state.shape)
    for n, (row, start, end) in enumerate(bounds):
        cut = (slice(row, row + 1), slice(start, end))
        q_n, k_n, e_n, z_n, g_n = (None if x is None else x[cut] for x in inputs)
        with without_autocast(q.device):
            o[cut], final[n : n + 1] = recurrent_forward(q_n, k_n, e_n, z_n, g_n, scale, state[n : n + 1], read)  # type: ignore[arg-type]
    return o, final


@torch.library.custom_op("kimi_linear::delta_rule_reference_backward", mutates_args=())
def delta_rule_reference_backward(
    d_o: Tensor,
    d_final: Tensor,
    q: Tensor,
    k: Tensor,
    erase_key: Tensor | None,
    write_value: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    read: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of (q, k, erase_key or empty, write_value, log_decay, initial state)."""
    bounds = sequence_bounds(cu_seqlens, q)
    *inputs, state = _wide(q, k, erase_key, write_value, log_decay, initial_state, len(bounds))
    gradients = [None if x is None else x.new_zeros(x.shape) for x in inputs]
    d_state = state.new_empty(state.shape)
    for n, (row, start, end) in enumerate(bounds):
        cut, at = (slice(row, row + 1), slice(start, end)), slice(n, n + 1)
        d_o_n, d_final_n = d_o[cut].to(state.dtype), d_final[at].to(state.dtype)
        q_n, k_n, e_n, z_n, g_n = (None if x is None else x[cut] for x in inputs)
        with without_autocast(q.device):
            *found, d_state[at] = recurrent_backward(d_o_n, d_final_n, q_n, k_n, e_n, z_n, g_n, scale, state[at], read)  # type: ignore[arg-type]
        for gradient, part in zip(gradients, found, strict=True):
            if gradient is not None and part is not None:
                gradient[cut].copy_(part)
    narrow = [
        q.new_empty(0) if x is None or d_x is None else sum_heads(d_x, x.shape[2]).to(x.dtype)
        for x, d_x in zip((q, k, erase_key, write_value, log_decay), gradients, strict=True)
    ]
    return narrow[0], narrow[1], narrow[2], narrow[3], narrow[4], d_state


register(delta_rule_reference, delta_rule_reference_backward)
