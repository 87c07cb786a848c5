"""Every backend of the delta rule and of its fused form: results and every gradient against the float64 reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_linear.base.numerics import relative_error
from support import ops
from support.delta_rule import (
    BACKEND_DTYPES,
    BACKENDS,
    CASES,
    KINDS,
    PARAMETERS,
    TOKENS,
    Inputs,
    assert_close,
    call,
    draw,
    errors,
    expected,
    reference,
    results,
    run,
    widest,
)

ALL = [
    pytest.param(op, backend, name, dtype, id=f"{op}-{backend}-{name}-{str(dtype)[6:]}")
    for op, backend, dtype in BACKEND_DTYPES
    for name in CASES[op]
    # The reference in float64 is what all others are held against.
    if (backend, dtype) != ("reference", torch.float64)
]
INTEGERS = (torch.int32, torch.int64)
every_backend = pytest.mark.parametrize(("op", "backend"), BACKENDS)
# For the properties: several chunks, grouped heads, a state, every kind of argument.
DENSE = {op: kind(name="dense", T=70, HV=4, B=3) for op, kind in KINDS.items()}
SHORT = {op: kind(name="short", T=37) for op, kind in KINDS.items()}
LENGTHS = (33, 0, 17, 1, 70, 0)
PACKED = {op: kind(name="packed", lengths=LENGTHS, HV=4) for op, kind in KINDS.items()}


@pytest.mark.parametrize(("op", "backend", "name", "dtype"), ALL)
def test_results_and_every_gradient_match_the_float64_reference(op, backend, name, dtype) -> None:
    with ops.nan_in_new_memory():
        found = run(op, draw(CASES[op][name], dtype), backend)
    assert errors(found, expected(op, name, dtype), dtype) == {}


HALF = [x for x in BACKEND_DTYPES if x[0] != "kda_core" and x[2] in (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(("op", "backend", "dtype"), HALF)
def test_a_decay_in_half_precision_is_taken_as_it_is(op, backend, dtype) -> None:
    inputs = draw(DENSE[op], dtype)
    inputs["log_decay"] = inputs["log_decay"].to(dtype)
    found = run(op, inputs, backend)
    assert errors(found, reference(op, inputs, found), dtype) == {}


@pytest.mark.parametrize(("op", "backend", "dtype"), BACKEND_DTYPES)
def test_output_has_the_values_dtype_and_states_and_gradients_their_own(op, backend, dtype) -> None:
    inputs = draw(SHORT[op], dtype)
    found = run(op, inputs, backend)
    assert found["o"].dtype == dtype
    assert found["final_state"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name, gradient in found.items():
        if name.startswith("d_"):
            assert (gradient.dtype, gradient.shape) == (inputs[name[2:]].dtype, inputs[name[2:]].shape), name


def cut(op: str, inputs: Inputs, start: int, end: int) -> Inputs:
    """Return the arguments of a dense call with tokens [start, end) alone."""
    return {**inputs, **{name: inputs[name][:, start:end] for name in TOKENS[op]}, "cu_seqlens": None}


def in_two(op: str, backend: str, t: int) -> ops.Function:
    """Return the call made in two, cut before token t, the state carried over."""

    def function(**inputs: Any) -> tuple[Tensor, Tensor]:
        o_1, state = call(op, cut(op, inputs, 0, t), backend)
        o_2, state = call(op, {**cut(op, inputs, t, inputs["q"].shape[1]), "initial_state": state}, backend)
        return torch.cat([o_1, o_2], 1), state

    return function


@every_backend
def test_a_run_split_at_any_token_equals_the_whole(op, backend) -> None:
    inputs = draw(SHORT[op], widest(op, backend))
    whole = call(op, inputs, backend)
    for t in range(SHORT[op].T + 1):
        assert_close(in_two(op, backend, t)(**inputs), whole)


@every_backend
@pytest.mark.parametrize("t", [1, 32, 50])
def test_gradients_flow_through_a_carried_state_as_through_one_call(op, backend, t) -> None:
    dtype = widest(op, backend)
    inputs = draw(DENSE[op], dtype)
    found = results(in_two(op, backend, t), inputs)
    assert errors(found, run(op, inputs, backend), dtype) == {}


def separately(op: str, backend: str, lengths: tuple[int, ...]) -> ops.Function:
    """Return the packed call made in dense calls, one a sequence."""

    def function(**inputs: Any) -> tuple[Tensor, Tensor]:
        outputs, states, start = [], [], 0
        for n, length in enumerate(lengths):
            one = {**cut(op, inputs, start, start + length), "initial_state": inputs["initial_state"][n : n + 1]}
            o, state = call(op, one, backend)
            outputs.append(o)
            states.append(state)
            start += length
        return torch.cat(outputs, 1), torch.cat(states)

    return function


def differences(op: str, backend: str, found: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Return the results that are not bit-identical, where they should be, or beyond a rounding, where not.

    Gradients of parameters are sums over all tokens, in another order. The reference promises no bits: it is made of
    torch's functions, some of which treat the elements at the end of a tensor in another way than the rest.
    """
    names = []
    for name, x in found.items():
        rounding = backend == "reference" or name[2:] in PARAMETERS[op]
        if not (relative_error(x, other[name]) < 1e-6 if rounding else torch.equal(x, other[name])):
            names.append(name)
    return names


@every_backend
def test_packed_sequences_equal_separate_calls(op, backend) -> None:
    lengths = (33, 0, 17, 1, 70, 0, 5, 1, 3)
    inputs = draw(KINDS[op](name="packed", lengths=lengths, HV=4, K=5, V=3))
    packed, separate = run(op, inputs, backend), results(separately(op, backend, lengths), inputs)
    assert differences(op, backend, packed, separate) == []


@every_backend
def test_packed_sequences_do_not_see_each_other(op, backend) -> None:
    inputs = draw(PACKED[op])
    o, state = call(op, inputs, backend)
    # The fourth sequence is token 50 alone.
    other = {**inputs, **{name: inputs[name].clone() for name in TOKENS[op]}}
    for name in TOKENS[op]:
        other[name][:, 50] = -1.0
    o_other, state_other = call(op, other, backend)
    changed = (o != o_other).flatten(2).any(-1)[0].nonzero().flatten()
    assert changed.tolist() == [50]
    assert (state != state_other).flatten(1).any(-1).nonzero().flatten().tolist() == [3]


@every_backend
def test_offsets_may_be_int32_or_int64(op, backend) -> None:
    inputs = draw(PACKED[op])
    assert inputs["cu_seqlens"].dtype == torch.int32
    narrow, wide = (call(op, {**inputs, "cu_seqlens": inputs["cu_seqlens"].to(dtype)}, backend) for dtype in INTEGERS)
    assert torch.equal(narrow[0], wide[0])
    assert torch.equal(narrow[1], wide[1])


@every_backend
def test_thousands_of_one_token_sequences(op, backend) -> None:
    inputs = draw(KINDS[op](name="ones", lengths=(1,) * 3000, H=1, K=2, V=2), widest(op, backend))
    o, state = call(op, inputs, backend)
    rows = {name: inputs[name].transpose(0, 1) for name in TOKENS[op]}
    o_rows, state_rows = call(op, {**inputs, **rows, "cu_seqlens": None}, "chunk")
    assert_close((o, state), (o_rows.transpose(0, 1), state_rows))


@every_backend
def test_later_tokens_change_nothing_before_them(op, backend) -> None:
    inputs = draw(DENSE[op])
    o, _ = call(op, inputs, backend)
    for t in (0, 1, 2, 15, 16, 31, 32, 33, 47, 63, 64, 69):
        other = {**inputs, **{name: inputs[name].clone() for name in TOKENS[op]}}
        for name in TOKENS[op]:
            other[name][:, t] = -2.0
        changed, _ = call(op, other, backend)
        assert torch.equal(changed[:, :t], o[:, :t])
        assert not torch.equal(changed[:, t], o[:, t])


@every_backend
@pytest.mark.parametrize("T", [3, 70])
def test_a_row_does_not_depend_on_its_batch(op, backend, T) -> None:
    inputs = draw(KINDS[op](name="rows", T=T, B=9, HV=4, K=5, V=3))
    found = run(op, inputs, backend)
    cotangents = ops.cotangents([found["o"], found["final_state"]])
    for row in range(9):
        at = slice(row, row + 1)
        alone = {**inputs, **{name: inputs[name][at] for name in (*TOKENS[op], "initial_state")}}
        single = run(op, alone, backend, [x[at] for x in cotangents])
        of_row = {name: x[at] for name, x in found.items() if name[2:] not in PARAMETERS[op]}
        assert differences(op, backend, of_row, single) == []


def cases(of: dict[str, Any]) -> list[Any]:
    return [pytest.param(op, backend, of[op], id=f"{op}-{backend}-{of[op].name}") for op, backend in BACKENDS]


each_layout = pytest.mark.parametrize(("op", "backend", "case"), [*cases(DENSE), *cases(PACKED)])


@each_layout
def test_two_runs_are_bit_identical(op, backend, case) -> None:
    ops.assert_runs_are_identical(lambda **x: call(op, x, backend), draw(case))


@each_layout
def test_memory_layout_of_the_inputs_does_not_matter(op, backend, case) -> None:
    ops.assert_strides_do_not_matter(lambda **x: call(op, x, backend), draw(case), torch.float32)


@each_layout
def test_memory_layout_of_states_and_gradients_does_not_matter(op, backend, case) -> None:
    """Axes in the opposite order, as after a transpose: dense, yet neither contiguous nor mergeable."""

    def reverse(x: Tensor) -> Tensor:
        axes = tuple(reversed(range(x.dim())))
        return x.permute(axes).contiguous().permute(axes)

    inputs = draw(case)
    found = run(op, inputs, backend)
    cotangents = [reverse(x) for x in ops.cotangents([found["o"], found["final_state"]])]
    reverse_inputs = {name: reverse(x) if ops.is_floating(x) else x for name, x in inputs.items()}
    o, state = call(op, reverse_inputs, backend)
    assert o.is_contiguous()
    assert state.is_contiguous()
    for name, x in run(op, reverse_inputs, backend, cotangents).items():
        assert relative_error(x, found[name]) < 1e-6, name


@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_and_gradients_are_left_as_they_were_and_never_returned(op, backend, case, dtype) -> None:
    inputs = draw(case, dtype)
    cotangents = ops.cotangents(list(call(op, inputs, backend)))
    given = [x for x in (*inputs.values(), *cotangents) if isinstance(x, Tensor)]
    before = [x.clone() for x in given]
    found = run(op, inputs, backend, cotangents)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))
    owners = [x.untyped_storage().data_ptr() for x in (*given, *found.values())]
    assert len(set(owners)) == len(owners)


@every_backend
def test_no_tokens_return_a_new_final_state(op, backend) -> None:
    inputs = draw(CASES[op]["T0"])
    o, state = call(op, inputs, backend)
    assert o.shape[1] == 0
    assert torch.equal(state, inputs["initial_state"])
    assert state.untyped_storage().data_ptr() != inputs["initial_state"].untyped_storage().data_ptr()


@every_backend
def test_no_batch(op, backend) -> None:
    found = run(op, draw(KINDS[op](name="none", B=0, T=4)), backend)
    assert found["o"].shape == (0, 4, 2, 6)
    assert found["final_state"].shape == (0, 2, 8, 6)


@every_backend
def test_each_gradient_may_be_asked_for_alone(op, backend) -> None:
    inputs = draw(DENSE[op])
    every = run(op, inputs, backend)
    for name in [n for n, x in inputs.items() if ops.is_floating(x)]:
        _, found = ops.run_with_gradients(lambda **x: call(op, x, backend), inputs, wanted=[name])
        assert torch.equal(found[name], every[f"d_{name}"]), name


@every_backend
@pytest.mark.parametrize("of", [0, 1], ids=["o", "final_state"])
@pytest.mark.parametrize("name", ["T33", "packed_empty_middle"])
def test_the_gradient_of_one_result_may_be_absent(op, backend, of, name) -> None:
    """Which is the same as zero: of the output, as where only a last state is used, or of the state."""
    dtype = widest(op, backend)
    inputs = draw(CASES[op][name], dtype)
    cotangents = ops.cotangents(list(call(op, inputs, backend)))
    _, found = ops.run_with_gradients(lambda **x: call(op, x, backend)[of], inputs, [cotangents[of]])
    cotangents[1 - of] = torch.zeros_like(cotangents[1 - of])
    zero = run(op, ops.in_float64(inputs), "reference", cotangents)
    gradients = {f"d_{name}": gradient for name, gradient in found.items()}
    assert errors(gradients, {name: zero[name] for name in gradients}, dtype) == {}


@every_backend
def test_the_callers_autocast_changes_nothing(op, backend) -> None:
    inputs = draw(DENSE[op])
    plain = run(op, inputs, backend)
    with torch.autocast(ops.DEVICE, dtype=torch.bfloat16):
        inside = run(op, inputs, backend)
    for name, x in plain.items():
        assert torch.equal(x, inside[name]), name


@every_backend
def test_inference_mode_changes_nothing(op, backend) -> None:
    inputs = draw(SHORT[op])
    o, state = call(op, inputs, backend)
    with torch.inference_mode():
        o_inference, state_inference = call(op, inputs, backend)
    assert torch.equal(o, o_inference)
    assert torch.equal(state, state_inference)
