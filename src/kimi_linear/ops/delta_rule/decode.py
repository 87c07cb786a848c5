"""One token a sequence, in place on a pool of states: rows named by slot change, all others stay bit-identical.

The arithmetic is wide; a pool of bfloat16 is rounded to once, where the state is stored.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kimi_linear.ops.autocast import without_autocast
from kimi_linear.ops.delta_rule.layout import expand_heads, wide_dtype
from kimi_linear.ops.delta_rule.pool import pick
from kimi_linear.ops.delta_rule.reference import recurrent_step
from kimi_linear.ops.registry import Call


def refuse_gradients(call: Call) -> list[str]:
    """Refuse where a gradient is needed: an update in place has none."""
    return ["updates states in place, so it has no gradient; use the many-token call"] if call.needs_grad else []


def wide_terms(q: Tensor, k: Tensor, e: Tensor | None, z: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """Return the inputs wide with their heads expanded: q, k, e or an empty tensor, z, decay [N, HV, K or 1]."""
    dtype, heads = wide_dtype(z.dtype), z.shape[1]
    q, k = (expand_heads(x.to(dtype), heads, 1) for x in (q, k))
    e = z.new_empty(0) if e is None else expand_heads(e.to(dtype), heads, 1)
    decay = (g if g.dim() == 3 else g.unsqueeze(-1)).to(dtype).exp()
    return q, k, e, z.to(dtype), decay


Step = Callable[[Tensor, tuple[Tensor, ...]], Tensor]


def _run(step: Step, pool: Tensor, slots: Tensor, z: Tensor, terms: tuple[Tensor, ...]) -> Tensor:
    """Run `step(states, terms) -> o`, which updates states [n, HV, K, V] in place, on the named rows of the pool."""
    picked = pick(pool, slots, wide_dtype(z.dtype))
    part = tuple(x if x.numel() == 0 else x[picked.sequences] for x in terms)
    with without_autocast(z.device):
        output = picked.spread(step(picked.states, part).to(z.dtype))
    picked.put_back(pool)
    return output


@torch.library.custom_op("kimi_linear::delta_rule_decode_reference", mutates_args=("pool",))
def delta_rule_decode_reference(
    q: Tensor,
    k: Tensor,
    erase_key: Tensor | None,
    write_value: Tensor,
    log_decay: Tensor,
    pool: Tensor,
    slots: Tensor,
    scale: float,
    read: str,
) -> Tensor:
    """Run one step of the recurrence as it is written."""

    def step(states: Tensor, terms: tuple[Tensor, ...]) -> Tensor:
        q, k, e, z, decay = terms
        after, o, _ = recurrent_step(states, q, k, e if erase_key is not None else None, z, decay, scale, read)
        states.copy_(after)
        return o

    return _run(step, pool, slots, write_value, wide_terms(q, k, erase_key, write_value, log_decay))


def advance(
    q: Tensor,
    k: Tensor,
    e: Tensor | None,
    z: Tensor,
    g: Tensor,
    pool: Tensor,
    slots: Tensor,
    scale: float,
    read: str,
) -> Tensor:
    """Read the old state once for both products, then decay and write it in place.

    With a = exp(g): x = (a e) S, y = (a q) S, written = z - x, o = scale (y + (q k) written), S <- a S + k written.
    """

    def step(states: Tensor, terms: tuple[Tensor, ...]) -> Tensor:
        q, k, e_or_empty, z, decay = terms
        queries = [decay * q]
        if e is not None:
            queries.append(decay * e_or_empty if read == "post" else e_or_empty)
        products = torch.stack(queries, 2) @ states
        written = z if e is None else z - products[:, :, 1]
        states.mul_(decay.unsqueeze(-1)).addcmul_(k.unsqueeze(-1), written.unsqueeze(-2))
        return (products[:, :, 0] + (q * k).sum(-1, keepdim=True) * written) * scale

    return _run(step, pool, slots, z, wide_terms(q, k, e, z, g))


@torch.library.custom_op("kimi_linear::delta_rule_decode_chunk", mutates_args=("pool",))
def delta_rule_decode_chunk(
    q: Tensor,
    k: Tensor,
    erase_key: Tensor | None,
    write_value: Tensor,
    log_decay: Tensor,
    pool: Tensor,
    slots: Tensor,
    scale: float,
    read: str,
) -> Tensor:
    """Run `advance`."""
    return advance(q, k, erase_key, write_value, log_decay, pool, slots, scale, read)


@delta_rule_decode_reference.register_fake
@delta_rule_decode_chunk.register_fake
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
) -> Tensor:
    return torch.empty_like(write_value, memory_format=torch.contiguous_format)
