"""Calls of the delta rule's many-token operators by name, and their float64 references, each computed once."""

import functools
from typing import Any

import torch
from torch import Tensor

from kimi_linear.base.numerics import relative_error, tolerance
from kimi_linear.ops import delta_rule, gated_delta_rule, kda, kda_core
from kimi_linear.ops.delta_rule.specs import (
    CORE_CASES,
    DELTA_RULE_CASES,
    KDA_CASES,
    CoreCase,
    DeltaRuleCase,
    KdaCase,
    make_core_inputs,
    make_inputs,
    make_kda_inputs,
)
from support import ops


def weighed(log_decay: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
    """Run the front with a strength beta: `gated_delta_rule` for a decay a head, else `kda`."""
    front = gated_delta_rule if log_decay.dim() == 3 else kda
    return front(log_decay=log_decay, **inputs)


FUNCTIONS = {"delta_rule": delta_rule, "kda": weighed, "kda_core": kda_core}
CASES: dict[str, dict[str, Any]] = {"delta_rule": DELTA_RULE_CASES, "kda": KDA_CASES, "kda_core": CORE_CASES}
KINDS = {"delta_rule": DeltaRuleCase, "kda": KdaCase, "kda_core": CoreCase}
# Under what name a function's backends are registered.
REGISTERED = {"delta_rule": "delta_rule", "kda": "delta_rule", "kda_core": "kda_core"}
# Arguments with a token axis, and parameters, whose gradients are sums over all tokens.
TOKENS = {
    "delta_rule": ("q", "k", "erase_key", "write_value", "log_decay"),
    "kda": ("q", "k", "v", "log_decay", "beta"),
    "kda_core": ("q", "k", "v", "gate", "beta"),
}
PARAMETERS: dict[str, tuple[str, ...]] = {"delta_rule": (), "kda": (), "kda_core": ("A_log", "dt_bias")}
GATE_GRADIENTS = ("log_decay", "gate", "beta", "A_log", "dt_bias")
BACKENDS = [(op, backend) for op in FUNCTIONS for backend in ops.backends(REGISTERED[op])]
BACKEND_DTYPES = [
    (op, backend, dtype) for op, name in REGISTERED.items() for backend, dtype in ops.backend_dtypes(name)
]

Inputs = dict[str, Any]


def widest(op: str, backend: str) -> torch.dtype:
    """Return the most precise dtype a backend runs."""
    return torch.float64 if backend in ops.backends(REGISTERED[op], torch.float64) else torch.float32


def assert_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Compare results that differ by the order of operations, by the output tolerance of their dtypes."""
    for one, other in zip(found, expected, strict=True):
        ops.assert_close(one, other)


def draw(case: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    """Return the keyword arguments of a case's call."""
    if isinstance(case, CoreCase):
        return make_core_inputs(case, dtype, seed, ops.DEVICE)
    return (make_inputs if isinstance(case, DeltaRuleCase) else make_kda_inputs)(case, dtype, seed, ops.DEVICE)


def call(op: str, inputs: Inputs, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Run an operator."""
    return FUNCTIONS[op](**inputs, backend=backend)


def results(function: ops.Function, inputs: Inputs, cotangents: list[Tensor] | None = None) -> dict[str, Tensor]:
    """Return o, final_state and d_<name>, the gradient of every floating argument."""
    (o, state), gradients = ops.run_with_gradients(function, inputs, cotangents)
    return {"o": o, "final_state": state, **{f"d_{name}": g for name, g in gradients.items()}}


def run(
    op: str, inputs: Inputs, backend: str | None = None, cotangents: list[Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the results of a call."""
    return results(lambda **x: call(op, x, backend), inputs, cotangents)


def reference(op: str, inputs: Inputs, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the float64 reference of a call, on the CPU, with the gradients of its outputs as the call saw them."""
    cotangents = ops.cotangents([found["o"], found["final_state"]])
    return run(op, ops.on_cpu(ops.in_float64(inputs)), "reference", cotangents)


@functools.cache
def expected(op: str, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the float64 reference of a named case drawn in `dtype`; the same for every backend."""
    inputs = ops.on_cpu(draw(CASES[op][name], dtype))
    o, state = call(op, inputs)
    return reference(op, inputs, {"o": o, "final_state": state})


def errors(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> dict[str, str]:
    """Return what is beyond the tolerance table: name -> error and limit."""
    limits, beyond = tolerance(dtype), {}
    assert found.keys() == expected.keys()
    for name, x in found.items():
        limit = limits.output
        if name.startswith("d_"):
            limit = limits.gate_gradient if name[2:] in GATE_GRADIENTS else limits.gradient
        error = relative_error(x.cpu(), expected[name].cpu())
        if not error <= limit:
            beyond[name] = f"{error:.2e} > {limit:.0e}"
    return beyond
