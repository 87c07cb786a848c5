"""The native backward of the delta rule: the same bits for any number of threads and any company; many segments."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_linear.ops.delta_rule.specs import CoreCase, DeltaRuleCase, KdaCase
from support import ops
from support.delta_rule import PARAMETERS, TOKENS, draw, errors, reference, run

pytestmark = ops.NATIVE

# A segment is 256 tokens: one under, at and over it, and several.
LENGTHS = (255, 3, 0, 600, 257)
SIZES = {"H": 2, "K": 20, "V": 12}
PACKED = {
    "delta_rule": DeltaRuleCase(name="packed", lengths=LENGTHS, HV=4, **SIZES),
    "kda": KdaCase(name="packed", lengths=LENGTHS, HV=4, **SIZES),
    "kda_core": CoreCase(name="packed", lengths=LENGTHS, HV=4, **SIZES),
}
WIDE = {
    "delta_rule": DeltaRuleCase(name="wide", T=530, H=1, K=64, V=96, keys="correlated", beta=1.0),
    "kda": KdaCase(name="wide", T=530, H=1, K=64, V=96, keys="correlated", beta=1.0),
    "kda_core": CoreCase(name="wide", T=530, H=1, K=64, V=96),
}
DTYPES = (torch.float32, torch.bfloat16)
each_op = pytest.mark.parametrize("op", PACKED)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def sequence(op: str, inputs: dict[str, Any], n: int, start: int, end: int) -> dict[str, Any]:
    """Return the call of one sequence of a pack alone."""
    cut = {name: inputs[name][:, start:end] for name in TOKENS[op] if inputs[name] is not None}
    return {**inputs, **cut, "initial_state": inputs["initial_state"][n : n + 1], "cu_seqlens": None}


@each_op
@pytest.mark.parametrize("cases", [PACKED, WIDE], ids=["packed", "wide"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_over_several_segments_match_the_reference(op, cases, dtype) -> None:
    inputs = draw(cases[op], dtype)
    found = run(op, inputs, "cpu")
    assert errors(found, reference(op, inputs, found), dtype) == {}


@each_op
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("HV", [2, 4])
def test_gradients_have_the_same_bits_for_any_number_of_threads(op, dtype, HV) -> None:
    case = type(PACKED[op])(name="threads", lengths=LENGTHS, HV=HV, **SIZES)
    inputs = draw(case, dtype)
    with threads(1):
        alone = run(op, inputs, "cpu")
    for count in (2, 3, 7):
        with threads(count):
            found = run(op, inputs, "cpu")
        assert [name for name, x in alone.items() if not torch.equal(x, found[name])] == []


@each_op
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequences_gradients_have_the_same_bits_alone_and_in_a_pack(op, dtype) -> None:
    inputs = draw(PACKED[op], dtype)
    packed = run(op, inputs, "cpu")
    d_o, d_state = ops.cotangents([packed["o"], packed["final_state"]])
    start = 0
    for n, length in enumerate(LENGTHS):
        at = slice(start, start + length)
        single = run(op, sequence(op, inputs, n, at.start, at.stop), "cpu", [d_o[:, at], d_state[n : n + 1]])
        for name, x in single.items():
            if name[2:] in PARAMETERS[op]:
                continue
            tokens = name == "o" or name[2:] in TOKENS[op]
            assert torch.equal(x, packed[name][:, at] if tokens else packed[name][n : n + 1]), (n, name)
        start += length


@pytest.mark.parametrize("log_decay", [-1000.0, -100.0, -41.0, -39.0, -20.0])
@pytest.mark.parametrize("read", ["post", "pre"])
def test_extreme_decays_have_finite_gradients_that_vanish_with_the_decay(log_decay, read) -> None:
    inputs = draw(DeltaRuleCase(name="extreme", T=64, read=read))
    inputs["log_decay"] = torch.full_like(inputs["log_decay"], log_decay)
    found = run("delta_rule", inputs, "cpu")
    expected = reference("delta_rule", inputs, found)
    for name, x in found.items():
        assert bool(x.isfinite().all()), name
    # The true gradient has the factor exp(log_decay).
    difference: Tensor = found["d_log_decay"] - expected["d_log_decay"]
    assert float(difference.abs().max()) < (1e-5 if log_decay > -40 else 1e-12)


def test_more_sequences_than_runs_of_work_sum_the_same_parameter_gradients() -> None:
    inputs = draw(CoreCase(name="many", lengths=(2,) * 150, H=1, K=4, V=3))
    found = run("kda_core", inputs, "cpu")
    assert errors(found, reference("kda_core", inputs, found), torch.float32) == {}
