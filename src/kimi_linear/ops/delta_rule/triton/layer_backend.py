"""The `triton` backend of a layer's decode step. Imports triton when it first runs."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kimi_linear.base import env
from kimi_linear.ops.checks import check_slots_values
from kimi_linear.ops.delta_rule.triton.backend import refuse_decode
from kimi_linear.ops.registry import Call

if TYPE_CHECKING:
    from kimi_linear.ops.delta_rule.layer_decode import KDAPools, KDAWeights

MOST_TAPS = 16


def refuse(call: Call) -> list[str]:
    """Refuse what the kernel does not compute, and gradients."""
    taps = call.sizes.get("W", 1)
    return refuse_decode(call) + ([f"takes {MOST_TAPS} taps at most, not {taps}"] if taps > MOST_TAPS else [])


@torch.library.custom_op(
    "kimi_linear::kda_layer_decode_triton", mutates_args=("pool_q", "pool_k", "pool_v", "pool_states")
)
def kda_layer_decode_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    beta: Tensor,
    output_gate: Tensor,
    conv_q: Tensor,
    conv_k: Tensor,
    conv_v: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    norm: Tensor,
    pool_q: Tensor,
    pool_k: Tensor,
    pool_v: Tensor,
    pool_states: Tensor,
    slots: Tensor,
    lower_bound: float | None,
    beta_scale: float,
    scale: float,
    eps: float,
    silu: bool,
) -> Tensor:
    """Advance one token; see `kimi_linear.ops.delta_rule.kda_layer_decode`. Taps are [D, W]."""
    from kimi_linear.ops.delta_rule.triton.layer_token import layer_token

    # On a GPU a look at the slots would wait for it; there a slot outside of the pools is skipped.
    if not slots.is_cuda or env.read("KIMI_LINEAR_DEBUG"):
        check_slots_values(slots, pool_states.shape[0])
    rows = tuple(x.contiguous() for x in (q, k, v, gate, beta, output_gate))
    given = (conv_q, conv_k, conv_v, A_log, dt_bias, norm)
    weights = tuple(None if x is None else x.contiguous() for x in given)
    pools = (pool_q, pool_k, pool_v, pool_states)
    return layer_token(rows, weights, pools, slots.contiguous(), lower_bound, beta_scale, scale, eps, silu)


@kda_layer_decode_triton.register_fake
def _fake(*inputs: Any) -> Tensor:
    return torch.empty_like(inputs[2], memory_format=torch.contiguous_format)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    beta: Tensor,
    output_gate: Tensor,
    weights: "KDAWeights",
    pools: "KDAPools",
    slots: Tensor,
    *numbers: Any,
) -> Tensor:
    """Run `kda_layer_decode_triton` on the parts of the weights and of the pools."""
    taps = (weights.conv_q.flatten(1), weights.conv_k.flatten(1), weights.conv_v.flatten(1))
    return kda_layer_decode_triton(q, k, v, gate, beta, output_gate, *taps, *weights[3:], *pools, slots, *numbers)
