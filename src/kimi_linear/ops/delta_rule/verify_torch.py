"""Verification and replay in plain PyTorch, on any device: `chunk`, draft tokens as one chunk, and `reference`.

With S the committed state and the factors of `scores.py` for one chunk of T tokens:

    R = M (z - e~ S),    O = scale (q~ S + P R)

R is what the tokens write, and what replays them. Letters as in `chunk.py`; the results are o [N, T, HV, V] and the
trace's decay, key and written value.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kimi_linear.ops.autocast import without_autocast
from kimi_linear.ops.delta_rule.chunk import PlainSource, Settings, Source
from kimi_linear.ops.delta_rule.core_chunk import CoreSource
from kimi_linear.ops.delta_rule.decode import wide_terms
from kimi_linear.ops.delta_rule.layout import DenseTile, chunk_length, expand_heads, wide_dtype
from kimi_linear.ops.delta_rule.pool import check_accepted_values, pick
from kimi_linear.ops.delta_rule.reference import recurrent_step

Found = tuple[Tensor, Tensor, Tensor, Tensor]


def room(k: Tensor, value: Tensor, g: Tensor) -> Found:
    """Return uninitialised memory for o and the trace of k [N, T, H, K], value [N, T, HV, V], g [N, T, HV(, K)]."""
    wide = wide_dtype(value.dtype)
    layout = torch.contiguous_format
    decay, key, written = (torch.empty_like(x, dtype=wide, memory_format=layout) for x in (g, k, value))
    return torch.empty_like(value, memory_format=layout), decay, key, written


def _on_states(
    run: Callable[..., Found], pool: Tensor, slots: Tensor, k: Tensor, value: Tensor, g: Tensor, *others: Tensor | None
) -> Found:
    """Return run(states, k, value, g, *others) of the sequences with a slot, and zero rows for the others."""
    picked = pick(pool, slots, wide_dtype(value.dtype))
    if 0 in (picked.states.shape[0], k.shape[1]):
        o, decay, key, written = (x.zero_() for x in room(k, value, g))
        return o, decay, key, written
    with without_autocast(k.device):
        found = run(picked.states, *(picked.of(x) for x in (k, value, g, *others)))
    o, decay, key, written = (picked.spread(x) for x in found)
    return o.to(value.dtype), decay, key, written


def _one_chunk(source: Source, settings: Settings, states: Tensor, key_heads: int) -> Found:
    """Run all tokens as one chunk, the last rows of which are empty where T is no power of two."""
    N, T, HV, _ = source.value.shape
    C = chunk_length(T, T)
    terms = source.load(DenseTile(0, N, 0, T, C))
    scores = settings.prepare(terms, settings.read, keep=False)
    read_out = torch.bmm(scores.queries.flatten(1, 2), states.flatten(0, 1)).unflatten(1, (C, -1))
    written = terms.z
    if scores.inverse is not None:
        written = torch.bmm(scores.inverse, terms.z - read_out[:, :, 1])
    o = torch.baddbmm(read_out[:, :, 0], scores.blocks[:, :, 0], written).mul_(settings.scale)

    def by_token(x: Tensor, step: int = 1) -> Tensor:
        return x.unflatten(0, (N, HV))[:, ::step, :T].transpose(1, 2).contiguous()

    decay = by_token(terms.g.exp())
    key = by_token(terms.k, HV // key_heads)
    return by_token(o), decay.squeeze(-1) if settings.scalar else decay, key, by_token(written)


@torch.library.custom_op("kimi_linear::delta_rule_verify_chunk", mutates_args=())
def delta_rule_verify_chunk(
    q: Tensor,
    k: Tensor,
    erase_key: Tensor | None,
    write_value: Tensor,
    log_decay: Tensor,
    pool: Tensor,
    slots: Tensor,
    scale: float,
    read: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run one chunk; see `kimi_linear.ops.delta_rule.delta_rule_verify`."""

    def run(states: Tensor, k: Tensor, z: Tensor, g: Tensor, q: Tensor, e: Tensor | None) -> Found:
        settings = Settings(scale, read, g.dim() == 3)
        return _one_chunk(PlainSource(q, k, e, z, g), settings, states, k.shape[2])

    return _on_states(run, pool, slots, k, write_value, log_decay, q, erase_key)


@torch.library.custom_op("kimi_linear::kda_core_verify_chunk", mutates_args=())
def kda_core_verify_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    lower_bound: float | None,
    beta_scale: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run one chunk from the raw inputs; see `kimi_linear.ops.delta_rule.kda_core_verify`."""

    def run(states: Tensor, k: Tensor, v: Tensor, gate: Tensor, q: Tensor, beta: Tensor) -> Found:
        source = CoreSource(q, k, v, gate, beta, A_log, dt_bias, lower_bound, beta_scale)
        return _one_chunk(source, Settings(scale, "post", False), states, k.shape[2])

    return _on_states(run, pool, slots, k, v, gate, q, beta)


@torch.library.custom_op("kimi_linear::delta_rule_verify_reference", mutates_args=())
def delta_rule_verify_reference(
    q: Tensor,
    k: Tensor,
    erase_key: Tensor | None,
    write_value: Tensor,
    log_decay: Tensor,
    pool: Tensor,
    slots: Tensor,
    scale: float,
    read: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the recurrence, as the one-token call's reference does."""

    def run(states: Tensor, k: Tensor, z: Tensor, g: Tensor, q: Tensor, e: Tensor | None) -> Found:
        found = []
        for t in range(k.shape[1]):
            e_now = None if e is None else e[:, t]
            q_t, k_t, e_t, z_t, decay = wide_terms(q[:, t], k[:, t], e_now, z[:, t], g[:, t])
            e_or_none = None if e is None else e_t
            states, o, written = recurrent_step(states, q_t, k_t, e_or_none, z_t, decay, scale, read)
            key = k_t[:, :: k_t.shape[1] // k.shape[2]]
            found.append((o, decay.squeeze(-1) if g.dim() == 3 else decay, key, written))
        o, decay, key, written = (torch.stack(x, 1) for x in zip(*found, strict=True))
        return o, decay, key, written

    return _on_states(run, pool, slots, k, write_value, log_decay, q, erase_key)


@delta_rule_verify_chunk.register_fake
@delta_rule_verify_reference.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    erase_key: Tensor | None,
    write_value: Tensor,
    log_decay: Tensor,
    pool: Tensor,
    slots: Tensor,
    scale: float,
    read: str,
) -> Found:
    return room(k, write_value, log_decay)


@kda_core_verify_chunk.register_fake
def _fake_core(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    lower_bound: float | None,
    beta_scale: float,
    scale: float,
) -> Found:
    return room(k, v, gate)


def _taken(decay: Tensor, key: Tensor, written: Tensor, accepted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the trace by value head, [N, HV, T, ..], tokens that are not accepted neutral: decay 1, the rest 0."""
    N, T, HV, _ = written.shape
    decay = decay if decay.dim() == 4 else decay.unsqueeze(-1)
    no = (torch.arange(T, device=key.device) >= accepted[:, None]).view(N, 1, T, 1)
    decay, key, written = (x.transpose(1, 2) for x in (decay, expand_heads(key, HV), written))
    return decay.masked_fill(no, 1), key.masked_fill(no, 0), written.masked_fill(no, 0)


@torch.library.custom_op("kimi_linear::delta_rule_replay_chunk", mutates_args=("pool",))
def delta_rule_replay_chunk(
    decay: Tensor, key: Tensor, written: Tensor, accepted: Tensor, pool: Tensor, slots: Tensor
) -> None:
    """Replay all accepted tokens by one product: S <- (prod a) S + sum_t (k_t a_{t+1} ... a_T) w_t^T."""
    check_accepted_values(accepted, key.shape[1])
    picked = pick(pool, torch.where(accepted > 0, slots, -1), written.dtype)
    n, T = picked.states.shape[0], key.shape[1]
    if 0 in (n, T):
        return
    decay, key, written = _taken(*(x[picked.sequences] for x in (decay, key, written, accepted)))
    after = torch.cat([decay[:, :, 1:], torch.ones_like(decay[:, :, :1])], 2).flip(2).cumprod(2).flip(2)
    with without_autocast(pool.device):
        update = (key * after).transpose(2, 3) @ written
    picked.states.mul_((decay[:, :, 0] * after[:, :, 0]).unsqueeze(-1)).add_(update)
    picked.put_back(pool)


@torch.library.custom_op("kimi_linear::delta_rule_replay_reference", mutates_args=("pool",))
def delta_rule_replay_reference(
    decay: Tensor, key: Tensor, written: Tensor, accepted: Tensor, pool: Tensor, slots: Tensor
) -> None:
    """Replay one token after the other: what `recurrent_step` does to the state."""
    check_accepted_values(accepted, key.shape[1])
    picked = pick(pool, torch.where(accepted > 0, slots, -1), written.dtype)
    heads, states = written.shape[2], picked.states
    decay, key, written, accepted = (x[picked.sequences] for x in (decay, key, written, accepted))
    a, k = decay if decay.dim() == 4 else decay.unsqueeze(-1), expand_heads(key, heads)
    for t in range(key.shape[1]):
        after = a[:, t].unsqueeze(-1) * states + k[:, t].unsqueeze(-1) * written[:, t].unsqueeze(-2)
        states = torch.where((t < accepted).view(-1, 1, 1, 1), after, states)
    picked.states.copy_(states)
    picked.put_back(pool)


@delta_rule_replay_chunk.register_fake
@delta_rule_replay_reference.register_fake
def _fake_replay(decay: Tensor, key: Tensor, written: Tensor, accepted: Tensor, pool: Tensor, slots: Tensor) -> None:
    return None
