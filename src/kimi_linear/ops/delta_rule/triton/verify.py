"""The `triton` backend's operators of verification and replay. Imports triton when one first runs."""

from typing import Any

import torch
from torch import Tensor

from kimi_linear.ops.checks import check_slots_values
from kimi_linear.ops.delta_rule.pool import check_accepted_values, unread
from kimi_linear.ops.delta_rule.triton.backend import core_inputs, plain_inputs
from kimi_linear.ops.delta_rule.verify_torch import room


@torch.library.custom_op("kimi_linear::delta_rule_verify_triton", mutates_args=())
def delta_rule_verify_triton(
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
    """Walk the draft tokens; see `kimi_linear.ops.delta_rule.delta_rule_verify`."""
    inputs = plain_inputs(q, k, erase_key, write_value, log_decay, None, scale, None, read)
    return _verify(inputs, pool, slots, q.shape[:2])


@torch.library.custom_op("kimi_linear::kda_core_verify_triton", mutates_args=())
def kda_core_verify_triton(
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
    """Walk the draft tokens from the raw inputs; see `kimi_linear.ops.delta_rule.kda_core_verify`."""
    inputs = core_inputs(q, k, v, gate, beta, A_log, dt_bias, lower_bound, beta_scale, scale, None)
    return _verify(inputs, pool, slots, q.shape[:2])


def _verify(inputs: Any, pool: Tensor, slots: Tensor, lead: torch.Size) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from kimi_linear.ops.delta_rule.triton import tokens

    if not unread(slots):
        check_slots_values(slots, pool.shape[0])
    o, decay, key, written = (x.unflatten(0, lead) for x in tokens.verify(inputs, pool, slots.contiguous(), lead[1]))
    return o, decay, key, written


@torch.library.custom_op("kimi_linear::delta_rule_replay_triton", mutates_args=("pool",))
def delta_rule_replay_triton(
    decay: Tensor, key: Tensor, written: Tensor, accepted: Tensor, pool: Tensor, slots: Tensor
) -> None:
    """Replay the accepted tokens; see `kimi_linear.ops.delta_rule.delta_rule_replay`."""
    from kimi_linear.ops.delta_rule.triton import tokens

    if not unread(slots):
        check_slots_values(slots, pool.shape[0])
    check_accepted_values(accepted, key.shape[1])
    decay, key, written, accepted, slots = (x.contiguous() for x in (decay, key, written, accepted, slots))
    tokens.replay(decay, key, written, accepted, pool, slots)


@delta_rule_verify_triton.register_fake
def _fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return room(inputs[1], *inputs[3:5])


@kda_core_verify_triton.register_fake
def _fake_core(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return room(*inputs[1:4])


@delta_rule_replay_triton.register_fake
def _fake_replay(*inputs: Any) -> None:
    return None
