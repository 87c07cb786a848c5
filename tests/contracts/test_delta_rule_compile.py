"""Every backend is a custom operator torch understands: opcheck passes, and the compiler sees it whole."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_linear.ops import delta_rule_decode, kda_core_decode
from kimi_linear.ops.delta_rule import chunk, core_chunk, decode, reference
from kimi_linear.ops.delta_rule.specs import CoreCase, DeltaRuleCase, KdaCase
from support import ops
from support.delta_rule import BACKENDS, KINDS, call, draw

SMALL: dict[str, Any] = {"K": 3, "V": 2}
BARE: dict[str, Any] = {"name": "bare", "T": 5, "initial_state": False, **SMALL}
CASES = {
    "delta_rule": {
        "dense": DeltaRuleCase(name="dense", T=5, HV=4, **SMALL),
        "packed": DeltaRuleCase(name="packed", lengths=(3, 0, 2), erase="key", read="pre", **SMALL),
        "bare": DeltaRuleCase(erase="none", scalar_decay=True, **BARE),
    },
    "kda": {
        "dense": KdaCase(name="dense", T=5, HV=4, **SMALL),
        "packed": KdaCase(name="packed", lengths=(3, 0, 2), **SMALL),
        "bare": KdaCase(scalar_decay=True, **BARE),
    },
    "kda_core": {
        "dense": CoreCase(name="dense", T=5, HV=4, **SMALL),
        "packed": CoreCase(name="packed", lengths=(3, 0, 2), **SMALL),
        "bare": CoreCase(has_rate=False, has_bias=False, lower_bound=-5.0, **BARE),
    },
}
kinds = pytest.mark.parametrize("kind", ["dense", "packed", "bare"])


def positional(inputs: dict[str, Any]) -> tuple[Any, ...]:
    """Return the custom operator's own argument list; `allow_neg_eigval` is a factor there."""
    given = {**inputs, "scale": 0.5}
    if "allow_neg_eigval" in given:
        given["allow_neg_eigval"] = 1.0
    return tuple(given.values())


def assert_passes_opcheck(forward: Any, backward: Any, inputs: dict[str, Any]) -> None:
    arguments = positional(inputs)
    ops.opcheck(forward, *ops.requiring_grad(*arguments))
    ops.opcheck(backward, *ops.cotangents(list(forward(*arguments))), *arguments)


@kinds
def test_chunk_passes_opcheck(kind) -> None:
    inputs = draw(CASES["delta_rule"][kind])
    assert_passes_opcheck(chunk.delta_rule_chunk, chunk.delta_rule_chunk_backward, inputs)


@kinds
def test_reference_passes_opcheck(kind) -> None:
    inputs = draw(CASES["delta_rule"][kind])
    assert_passes_opcheck(reference.delta_rule_reference, reference.delta_rule_reference_backward, inputs)


@kinds
def test_kda_core_passes_opcheck(kind) -> None:
    assert_passes_opcheck(core_chunk.kda_core_chunk, core_chunk.kda_core_chunk_backward, draw(CASES["kda_core"][kind]))


def test_strided_inputs_pass_opcheck() -> None:
    inputs = {n: ops.strided(x) if ops.is_floating(x) else x for n, x in draw(CASES["delta_rule"]["dense"]).items()}
    for forward in (chunk.delta_rule_chunk, reference.delta_rule_reference):
        torch.library.opcheck(forward, ops.requiring_grad(*positional(inputs)), test_utils="test_faketensor")


def token(op: str) -> dict[str, Any]:
    """Return the arguments of one decoded token of two sequences."""
    inputs = draw(KINDS[op](name="token", T=1, B=2, HV=4, **SMALL))
    del inputs["initial_state"], inputs["cu_seqlens"]
    return {n: x[:, 0] if isinstance(x, Tensor) and x.dim() > 2 else x for n, x in inputs.items()}


@pytest.mark.parametrize("slots", [[2, 0], [1, 2], [-1, 1]])
@pytest.mark.parametrize("backend", ["chunk", "reference"])
def test_decode_passes_opcheck(backend, slots) -> None:
    x = token("delta_rule")
    run = {"chunk": decode.delta_rule_decode_chunk, "reference": decode.delta_rule_decode_reference}[backend]
    inputs = (x["q"], x["k"], x["erase_key"], x["write_value"], x["log_decay"])
    pool, slots = torch.randn(3, 4, 3, 2, device=ops.DEVICE), torch.tensor(slots, device=ops.DEVICE)
    ops.opcheck(run, *inputs, pool, slots, 0.5, "post")


def test_kda_core_decode_passes_opcheck() -> None:
    x = token("kda_core")
    inputs = (x[name] for name in ("q", "k", "v", "gate", "beta", "A_log", "dt_bias"))
    pool, slots = torch.randn(3, 4, 3, 2, device=ops.DEVICE), torch.tensor([2, 0], device=ops.DEVICE)
    ops.opcheck(core_chunk.kda_core_decode_chunk, *inputs, pool, slots, None, 1.0, 0.5)


@kinds
@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_compiles_whole_forward_and_backward(op, backend, kind) -> None:
    ops.assert_compiles_whole(lambda **x: call(op, x, backend), draw(CASES[op][kind]))


@pytest.mark.parametrize(("op", "function"), [("delta_rule", delta_rule_decode), ("kda_core", kda_core_decode)])
def test_decode_compiles_whole_and_updates_the_pool(op, function) -> None:
    torch.compiler.reset()
    inputs, slots = token(op), torch.tensor([2, 0], device=ops.DEVICE)
    pool = torch.randn(3, 4, 3, 2, device=ops.DEVICE)
    plain = pool.clone()
    o = function(**inputs, pool=plain, slots=slots)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs, pool=pool, slots=slots), o)
    assert torch.equal(pool, plain)


@pytest.mark.parametrize("op", CASES)
def test_one_compilation_serves_every_length(op) -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda inputs: call(op, inputs), fullgraph=True, backend="aot_eager", dynamic=True)
    for T, stance in ((7, "default"), (40, "fail_on_recompile")):
        inputs = draw(KINDS[op](name="any", T=T, **SMALL))
        with torch.compiler.set_stance(stance):
            torch.testing.assert_close(compiled(inputs), call(op, inputs))
