"""Calls of `kda_layer_decode`: cases, their arguments, and a run on copies of the pools."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kimi_linear.ops import KDAPools, KDAWeights, kda_layer_decode
from support import ops

F64, F32 = torch.float64, torch.float32
POOLS = KDAPools._fields
ROWS = ("q", "k", "v", "gate", "beta", "output_gate")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call; `states` is the dtype of the pool of states, default: that in which they are computed."""

    name: str = "plain"
    N: int = 3
    T: int = 1
    H: int = 2
    HV: int = 2
    K: int = 8
    V: int = 6
    W: int = 4
    S: int = 5
    states: torch.dtype | None = None
    lower_bound: float | None = None
    has_rate: bool = True
    has_bias: bool = True
    allow_neg_eigval: bool = False
    activation: str = "sigmoid"
    logits: float = 1.0


def draw(case: Case, dtype: torch.dtype = F32, seed: int = 0) -> dict[str, Any]:
    """Return the keyword arguments of a call, its rows [N, T, ..] with T > 1, drawn in float64 and rounded once."""
    generator = torch.Generator().manual_seed(seed)
    wide = F64 if dtype == F64 else F32

    def normal(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64).to(ops.DEVICE, to)

    heads = (case.H, case.K), (case.H, case.K), (case.HV, case.V), (case.HV, case.K), (case.HV,), (case.HV, case.V)
    lead = (case.N,) if case.T == 1 else (case.N, case.T)
    rows = dict(zip(ROWS, (normal(*lead, *shape) for shape in heads), strict=True))
    for name in ("gate", "beta", "output_gate"):
        rows[name] *= case.logits
    channels = (case.H * case.K, case.H * case.K, case.HV * case.V)
    taps = [normal(channels[0], case.W), normal(channels[1], 1, case.W), normal(channels[2], 1, case.W)]
    rate, bias = normal(case.HV, to=wide) / 2, normal(case.HV * case.K, to=wide) / 2
    decay = (rate if case.has_rate else None, bias if case.has_bias else None)
    histories = [normal(case.S, c, case.W - 1) for c in channels]
    states = normal(case.S, case.HV, case.K, case.V, to=case.states or wide)
    return {
        **rows,
        "weights": KDAWeights(*taps, *decay, normal(case.V)),
        "pools": KDAPools(*histories, states),
        "slots": torch.randperm(case.S, generator=generator)[: case.N].to(ops.DEVICE),
        "eps": 1e-5,
        "activation": case.activation,
        "lower_bound": case.lower_bound,
        "allow_neg_eigval": case.allow_neg_eigval,
    }


def mapped(inputs: dict[str, Any], change: Any) -> dict[str, Any]:
    """Return the arguments with every floating tensor changed, those inside of weights and pools too."""

    def one(x: Any) -> Any:
        if isinstance(x, tuple):
            return x._replace(**{field: one(part) for field, part in x._asdict().items()})
        return change(x) if ops.is_floating(x) else x

    return {name: one(x) for name, x in inputs.items()}


def run(inputs: dict[str, Any], backend: str | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Return y and the pools behind the call, which runs on copies of them."""
    given = mapped(inputs, torch.clone)
    y = kda_layer_decode(**given, backend=backend)
    return y, {name: getattr(given["pools"], name) for name in POOLS}
