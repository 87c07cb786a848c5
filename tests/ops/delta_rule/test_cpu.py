"""The native kernels of the delta rule, in what is theirs alone: tiles, columns, threads, kept states, slots."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_linear.ops import delta_rule_decode, kda_core, kda_core_decode
from kimi_linear.ops.delta_rule import cpu, cpu_backward, cpu_decode
from kimi_linear.ops.delta_rule.specs import CoreCase, DeltaRuleCase
from support import ops
from support.delta_rule import KINDS, TOKENS, assert_close, call, draw, errors, reference, run

pytestmark = ops.NATIVE
SMALL: dict[str, Any] = {"K": 3, "V": 2}
DECODE = [("delta_rule", delta_rule_decode), ("kda_core", kda_core_decode)]
each_op = pytest.mark.parametrize("op", KINDS)
kinds = pytest.mark.parametrize("kind", ["dense", "packed", "bare"])


def case_of(op: str, kind: str) -> Any:
    bare = {
        "delta_rule": {"erase": "none", "scalar_decay": True},
        "kda": {"scalar_decay": True},
        "kda_core": {"lower_bound": -5.0, "has_rate": False},
    }[op]
    shapes: dict[str, dict[str, Any]] = {
        "dense": {"T": 5, "HV": 4},
        "packed": {"lengths": (3, 0, 2)},
        "bare": {"T": 5, "initial_state": False, **bare},
    }
    return KINDS[op](name=kind, **SMALL, **shapes[kind])


FORWARD = {"delta_rule": cpu.delta_rule_cpu, "kda": cpu.delta_rule_cpu, "kda_core": cpu.kda_core_cpu}
BACKWARD = {
    "delta_rule": cpu_backward.delta_rule_cpu_backward,
    "kda": cpu_backward.delta_rule_cpu_backward,
    "kda_core": cpu_backward.kda_core_cpu_backward,
}


def positional(op: str, inputs: dict[str, Any]) -> tuple[Any, ...]:
    """Return the custom operator's own argument list."""
    given = {**inputs, "scale": 0.5}
    if op == "kda_core":
        return tuple({**given, "allow_neg_eigval": 1.0}.values())
    if op == "delta_rule":
        return (*given.values(), None)
    q, k, v, log_decay, beta, scale, initial_state, cu_seqlens = given.values()
    return q, k, None, v, log_decay, scale, initial_state, cu_seqlens, "post", beta


@kinds
@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward_pass_opcheck(op, kind, dtype) -> None:
    forward, backward = FORWARD[op], BACKWARD[op]
    arguments = positional(op, draw(case_of(op, kind), dtype))
    ops.opcheck(forward, *ops.requiring_grad(*arguments), True)
    ops.opcheck(forward, *arguments, False)
    o, final, kept = forward(*arguments, True)
    ops.opcheck(backward, *ops.cotangents([o, final]), *arguments, kept)


@pytest.mark.parametrize("op", ["delta_rule", "kda_core"])
@pytest.mark.parametrize("slots", [[2, 0], [1, 2], [-1, 1]])
def test_decode_passes_opcheck(op, slots) -> None:
    inputs = draw(KINDS[op](name="token", T=1, B=2, HV=4, **SMALL))
    now = [None if inputs[n] is None else inputs[n][:, 0] for n in TOKENS[op]]
    pool, where = torch.randn(3, 4, 3, 2), torch.tensor(slots)
    if op == "delta_rule":
        ops.opcheck(cpu_decode.delta_rule_decode_cpu, *now, pool, where, 0.5, "post")
    else:
        rest = (inputs["A_log"], inputs["dt_bias"], pool, where, None, 1.0, 0.5)
        ops.opcheck(cpu_decode.kda_core_decode_cpu, *now, *rest)


# Around the tiles: 8 rows, vectors of 4 to 16 floats, blocks of two vectors.
WIDTHS = [(1, 1), (7, 9), (8, 16), (9, 15), (16, 17), (17, 31), (24, 33), (33, 47), (64, 64), (40, 128), (130, 70)]


@each_op
@pytest.mark.parametrize(("K", "V"), WIDTHS)
def test_every_width(op, K, V) -> None:
    inputs = draw(KINDS[op](name="widths", T=19, H=1, HV=2, K=K, V=V))
    found = run(op, inputs, "cpu")
    assert errors(found, reference(op, inputs, found), torch.float32) == {}


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_number_of_threads(op, dtype) -> None:
    """One item a head and one a few blocks of columns: as many as there are threads."""
    threads = torch.get_num_threads()
    for shape in ({"H": 1, "K": 64, "V": 112}, {"H": 4, "HV": 8, "B": 2}, {"H": 1, "lengths": (40, 3, 0, 17)}):
        inputs = draw(KINDS[op](name="threads", **{"T": 37, **shape}), dtype)
        try:
            torch.set_num_threads(1)
            alone = call(op, inputs, "cpu")
            for count in (2, 3, 5):
                torch.set_num_threads(count)
                assert all(torch.equal(x, y) for x, y in zip(call(op, inputs, "cpu"), alone, strict=True))
        finally:
            torch.set_num_threads(threads)


def cut(op: str, inputs: dict[str, Any], start: int, end: int) -> dict[str, Any]:
    return {**inputs, **{n: None if inputs[n] is None else inputs[n][:, start:end] for n in TOKENS[op]}}


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("t", [16, 48, 64])
def test_a_prompt_split_between_chunks_has_the_bits_of_the_whole(op, dtype, t) -> None:
    inputs = draw(KINDS[op](name="split", T=70, HV=4, K=16, V=32), dtype)
    o, state = call(op, inputs, "cpu")
    o_1, middle = call(op, cut(op, inputs, 0, t), "cpu")
    o_2, final = call(op, {**cut(op, inputs, t, 70), "initial_state": middle}, "cpu")
    assert torch.equal(torch.cat([o_1, o_2], 1), o)
    assert torch.equal(final, state)


@each_op
def test_the_kept_states_are_those_that_enter_the_segments(op) -> None:
    L = cpu.SEGMENT
    forward = FORWARD[op]
    lengths = (2 * L + 1, 0, L, 3)
    inputs = draw(KINDS[op](name="kept", lengths=lengths, **SMALL))
    _, _, kept = forward(*positional(op, inputs), True)
    expected, start = [], 0
    for n, length in enumerate(lengths):
        for t in range(0, length, L):
            part = {**cut(op, inputs, start, start + t), "cu_seqlens": None}
            expected.append(call(op, {**part, "initial_state": inputs["initial_state"][n : n + 1]}, "cpu")[1])
        start += length
    assert torch.equal(kept[: len(expected)], torch.cat(expected))
    assert (kept[len(expected) :] == 0).all()
    assert len(kept) == cpu.segment_bound(inputs["cu_seqlens"], 1, start)
    assert forward(*positional(op, inputs), False)[2].numel() == 0


MIXED = [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.float16)]


@each_op
@pytest.mark.parametrize(("one", "other"), MIXED)
@pytest.mark.parametrize("parity", [0, 1])
def test_every_tensor_may_have_its_own_dtype(op, one, other, parity) -> None:
    inputs = draw(KINDS[op](name="mixed", T=20, HV=4))
    for i, name in enumerate(TOKENS[op]):
        inputs[name] = inputs[name].to(one if i % 2 == parity or name == "q" else other)
    found = run(op, inputs, "cpu")
    assert found["o"].dtype == inputs["write_value" if op == "delta_rule" else "v"].dtype
    assert errors(found, reference(op, inputs, found), torch.bfloat16) == {}


@pytest.mark.parametrize(("op", "decode"), DECODE)
def test_a_decoded_token_does_not_depend_on_the_number_of_threads(op, decode) -> None:
    inputs = draw(KINDS[op](name="token", T=1, H=1, K=40, V=112))
    others = {n: x for n, x in inputs.items() if n not in (*TOKENS[op], "initial_state", "cu_seqlens")}
    now = {n: inputs[n][:, 0] for n in TOKENS[op]}
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            pool = inputs["initial_state"].clone()
            o = decode(**now, **others, pool=pool, slots=torch.tensor([0]), backend="cpu")
            found.append((o, pool))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


def test_a_long_decode_follows_the_prompt() -> None:
    inputs = draw(CoreCase(name="x", T=200, H=2, K=64, V=64))
    o, state = kda_core(**inputs, backend="cpu")
    pool = inputs["initial_state"].clone()
    others = {n: inputs[n] for n in ("A_log", "dt_bias", "lower_bound", "allow_neg_eigval")}
    steps = [
        kda_core_decode(
            **{n: inputs[n][:, t] for n in TOKENS["kda_core"]},
            **others,
            pool=pool,
            slots=torch.tensor([0]),
            backend="cpu",
        )
        for t in range(200)
    ]
    assert_close((torch.stack(steps, 1), pool), (o, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", ["none", "slow"])
@pytest.mark.parametrize("keys", ["correlated", "identical"])
def test_hard_keys_at_the_released_size(keys, gate, dtype) -> None:
    """Many keys alike and next to no decay, where rounded operands do the most harm."""
    case = DeltaRuleCase(name="x", T=512, H=1, K=128, V=128, keys=keys, gate=gate, beta=0.7, initial_state=False)
    inputs = draw(case, dtype)
    found = call("delta_rule", inputs, "cpu")
    expected: list[Tensor] = list(call("delta_rule", ops.in_float64(inputs), "reference"))
    assert errors(dict(zip("os", found, strict=True)), dict(zip("os", expected, strict=True)), dtype) == {}
