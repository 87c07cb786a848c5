"""The native kernels of the delta rule's one-token calls, in place on a pool of states."""

from collections.abc import Callable

import torch
from torch import Tensor

from kimi_linear.ops import native
from kimi_linear.ops.checks import check_slots_values
from kimi_linear.ops.delta_rule.cpu import plain, plain_float, plain_or_none, type_word


def _on_pool(run: Callable[[Tensor, Tensor], None], pool: Tensor, slots: Tensor) -> None:
    """Run `run(states, slots)` in place where every state of the pool is contiguous, else on a copy of those named."""
    rows = check_slots_values(slots, pool.shape[0])
    if pool.dtype == torch.float32 and pool.stride(3) == 1 and pool.stride(2) == pool.shape[3]:
        run(pool, slots.to(torch.int64).contiguous())
        return
    used = [row for row in rows if row >= 0]
    places = {row: place for place, row in enumerate(used)}
    where = torch.tensor(used, dtype=torch.int64)
    states = pool[where].float().contiguous()
    run(states, torch.tensor([places.get(row, -1) for row in rows], dtype=torch.int64))
    pool[where] = states.to(pool.dtype)


@torch.library.custom_op("kimi_linear::delta_rule_decode_cpu", mutates_args=("pool",))
def delta_rule_decode_cpu(
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
    """Advance one token; see `kimi_linear.ops.delta_rule.delta_rule_decode`."""
    q, k, z, g = plain(q), plain(k), plain(write_value), plain(log_decay)
    e = plain_or_none(erase_key)
    (N, H, K), (HV, V) = q.shape, z.shape[1:]
    o = torch.empty_like(z)
    kernel = native.kernel("delta_rule_decode", "ppppppppiiiiiiiiiiif")

    def run(states: Tensor, where: Tensor) -> None:
        types, erase_heads = type_word(q, k, e, z, g), 0 if e is None else e.shape[1]
        layout = (states.stride(0), states.stride(1), N, H, HV, K, V)
        kernel(q, k, e, z, g, states, where, o, types, *layout, erase_heads, g.dim() == 2, read == "pre", scale)

    _on_pool(run, pool, slots)
    return o.to(write_value.dtype)


@torch.library.custom_op("kimi_linear::kda_core_decode_cpu", mutates_args=("pool",))
def kda_core_decode_cpu(
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
) -> Tensor:
    """Advance one token; see `kimi_linear.ops.delta_rule.kda_core_decode`."""
    value_dtype = v.dtype
    q, k, v, gate, beta = plain(q), plain(k), plain(v), plain(gate), plain(beta)
    (N, H, K), (HV, V) = q.shape, v.shape[1:]
    rate, bias, o = plain_float(A_log), plain_float(dt_bias), torch.empty_like(v)
    kernel = native.kernel("kda_core_decode", "ppppppppppiiiiiiiifff")

    def run(states: Tensor, where: Tensor) -> None:
        types, layout = type_word(q, k, None, v, gate, beta), (states.stride(0), states.stride(1), N, H, HV, K, V)
        numbers = (lower_bound or 0.0, beta_scale, scale)
        kernel(q, k, v, gate, beta, rate, bias, states, where, o, types, *layout, *numbers)

    _on_pool(run, pool, slots)
    return o.to(value_dtype)


@delta_rule_decode_cpu.register_fake
def _fake_delta_rule(
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


@kda_core_decode_cpu.register_fake
def _fake_kda_core(
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
) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)
