"""FLOPs of a call as they are run: from the shapes that reach each operator, not from any configuration.

Matrix products are counted by torch; our operators, which it cannot look into, are counted here by their definition,
causal attention by the pairs that see each other.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from kimi_linear.ops.registry import OPS


def _short_conv(x: list[int], weight: list[int], *rest: Any, **kwargs: Any) -> int:
    batch, tokens, channels = x
    return 2 * batch * tokens * channels * weight[-1]


def _delta(q: list[int], k: list[int], third: list[int], *rest: Any, **kwargs: Any) -> int:
    batch, tokens, _, key_dim = q
    heads, value_dim = kwargs["out_shape"][0][2:]
    return 2 * batch * tokens * heads * 3 * key_dim * value_dim


def _attention(q: list[int], k: list[int], v: list[int], *rest: Any, **kwargs: Any) -> int:
    (batch, tokens, heads, key_dim), window = q, rest[-1]
    assert k[1] == tokens, "only whole prompts are counted"
    pairs = sum(min(t, window or t) for t in range(1, tokens + 1))
    return 2 * batch * heads * pairs * (key_dim + v[-1])


def _grouped_mlp(
    x: list[int], w1: list[int], w3: list[int], w2: list[int], weights: list[int], *rest: Any, **kw: Any
) -> int:
    return 2 * weights[0] * weights[1] * 3 * w1[1] * w1[2]


def _linear(x: list[int], weight: list[int], *rest: Any, **kwargs: Any) -> int:
    return 2 * math.prod(x) * weight[0]


_FORMULAS: dict[str, Callable[..., int]] = {
    "short_conv": _short_conv,
    "kda_core": _delta,
    "delta_rule": _delta,
    "attention": _attention,
    "grouped_mlp": _grouped_mlp,
    "linear": _linear,
}


def measured_flops(run: Callable[[], Any]) -> int:
    """Return the FLOPs of a forward call without gradients."""
    mapping = {}
    for op in OPS:
        for backend in OPS[op].backends:
            packet = getattr(torch.ops.kimi_linear, f"{op}_{backend.name}", None)
            if packet is not None and op in _FORMULAS:
                mapping[packet] = _FORMULAS[op]
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return counter.get_total_flops()
