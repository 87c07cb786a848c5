"""The Triton kernels of the short convolution: interpreted on the CPU, compiled on a GPU."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_linear.base.errors import BackendError, ShapeError
from kimi_linear.base.numerics import relative_error, tolerance
from kimi_linear.ops import short_conv, short_conv_decode
from kimi_linear.ops.conv.specs import SPECS, ConvSpec
from kimi_linear.ops.conv.triton import backend
from support import ops

pytestmark = [
    ops.TRITON,
    # The interpreter takes a loop's bound for a scalar, which numpy 2.3 warns of and 2.4 refuses.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]
F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
BY_NAME = {spec.name: spec for spec in SPECS}
SLOW = (
    "T64",
    "T97",
    "batch",
    "packed_ragged",
    "many_channels",
    "many_channels_and_taps",
    "packed_many_channels",
    "packed_ones",
)
CASES = [
    *((spec, F32) for spec in SPECS if spec.name not in SLOW),
    *((BY_NAME[name], dtype) for name in ("T17", "packed_empty_middle", "linear") for dtype in (BF16, FP16)),
    (ConvSpec("W16", T=19, W=16), F32),
    (ConvSpec("W9_packed", W=9, lengths=(4, 0, 11)), F32),
    # A second block of channels, mostly empty.
    (ConvSpec("D131", T=3, D=131), F32),
    (ConvSpec("packed_ones", lengths=(1,) * 7), BF16),
]
PACKED = ConvSpec("packed", lengths=(2, 0, 7, 1, 3))


def draw(spec: ConvSpec, dtype: torch.dtype) -> dict[str, Any]:
    return spec.inputs(dtype, ops.DEVICE)


def call(**arguments: Any) -> Any:
    return short_conv(**arguments, backend="triton")


@pytest.mark.parametrize(("spec", "dtype"), CASES, ids=[f"{spec.name}-{str(dtype)[6:]}" for spec, dtype in CASES])
def test_results_and_every_gradient_match_the_float64_reference(spec: ConvSpec, dtype: torch.dtype) -> None:
    ops.assert_matches_reference(short_conv, draw(spec, dtype), "triton", dtype)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("spec", [PACKED, ConvSpec("batch", B=2, T=6), ConvSpec("taps", W=6, lengths=(3, 0, 4))])
def test_runs_may_cut_segments_anywhere(spec: ConvSpec, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A border in a history, in a sequence, in its last rows; several segments in a run."""
    monkeypatch.setattr(backend, "run_length", lambda *_: rows)
    ops.assert_matches_reference(short_conv, draw(spec, F32), "triton", F32)


def test_results_do_not_depend_on_the_length_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw(dataclasses.replace(PACKED, lengths=(2, 0, 4)), BF16)
    outputs, grads = ops.run_with_gradients(call, inputs)
    monkeypatch.setattr(backend, "run_length", lambda *_: 3)
    again, again_grads = ops.run_with_gradients(call, inputs)
    for name in ("x", "initial_state"):
        assert torch.equal(again_grads[name], grads[name])
    assert all(torch.equal(x, y) for x, y in zip(again, outputs, strict=True))


def test_a_sequence_has_the_same_bits_alone_and_in_a_pack() -> None:
    inputs = draw(PACKED, BF16)
    y, state = call(**inputs)
    for n, (start, stop) in enumerate(itertools.pairwise(inputs["cu_seqlens"].tolist())):
        before = inputs["initial_state"][n : n + 1]
        alone = {**inputs, "x": inputs["x"][:, start:stop], "initial_state": before, "cu_seqlens": None}
        y_alone, state_alone = call(**alone)
        assert torch.equal(y_alone, y[:, start:stop])
        assert torch.equal(state_alone[0], state[n])


@pytest.mark.parametrize("split", [0, 1, 2, 5, 9])
def test_a_call_cut_anywhere_equals_the_whole(split: int) -> None:
    inputs = draw(ConvSpec("whole", B=2, T=9), F32)
    y, state = call(**inputs)
    head, middle = call(**{**inputs, "x": inputs["x"][:, :split]})
    tail, end = call(**{**inputs, "x": inputs["x"][:, split:], "initial_state": middle})
    assert torch.equal(torch.cat([head, tail], 1), y)
    assert torch.equal(end, state)


def test_a_slice_of_a_wider_projection_is_read_where_it_lies() -> None:
    inputs = draw(ConvSpec("batch", B=2, T=5), F32)
    wide = torch.full((2, 5, 20), torch.nan, device=ops.DEVICE)
    wide[..., 3:9] = inputs["x"]
    outputs, grads = ops.run_with_gradients(call, inputs)
    ops.assert_equal(ops.run_with_gradients(call, {**inputs, "x": wide[..., 3:9]}), (outputs, grads))
    assert backend._Run(wide[..., 3:9], inputs["weight"], None, None, True).x.data_ptr() == wide[..., 3:].data_ptr()


def test_states_hold_inputs_bit_for_bit() -> None:
    inputs = draw(ConvSpec("signs", lengths=(0, 1, 5)), F32)
    inputs["x"].fill_(-0.0)
    inputs["initial_state"].fill_(-0.0)
    _, state = call(**inputs)
    assert state.signbit().all()


def test_a_not_a_number_stays_in_its_sequence() -> None:
    inputs = draw(PACKED, F32)
    expected, _ = call(**inputs)
    inputs["x"][0, 1] = torch.nan
    y, _ = call(**inputs)
    assert torch.equal(y[:, 2:], expected[:, 2:])
    assert y[0, 1].isnan().all()


def test_wider_weights_and_states_keep_each_gradient_in_its_own_dtype() -> None:
    inputs = draw(PACKED, BF16)
    inputs |= {name: inputs[name].float() for name in ("weight", "initial_state")}
    ops.assert_matches_reference(short_conv, inputs, "triton", BF16)


@pytest.mark.parametrize("spec", [PACKED, ConvSpec("batch", B=2, T=5)], ids=lambda spec: spec.name)
def test_inputs_strides_and_repeated_runs(spec: ConvSpec) -> None:
    inputs = draw(spec, F32)
    ops.assert_inputs_unchanged(call, inputs)
    ops.assert_strides_do_not_matter(call, inputs, F32)
    ops.assert_runs_are_identical(call, inputs)


def opcheck(operator: Any, *arguments: Any) -> None:
    """Run torch's checks but the one that compiles, which is made below."""
    kinds = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, arguments, test_utils=kinds)


@pytest.mark.parametrize("spec", [PACKED, ConvSpec("no_state", B=2, T=2, initial_state=False)], ids=lambda s: s.name)
def test_the_operators_pass_opcheck(spec: ConvSpec) -> None:
    inputs = draw(spec, F32)
    args = (*(inputs[name] for name in ("x", "weight", "initial_state", "cu_seqlens")), True)
    opcheck(backend.short_conv_triton, *ops.requiring_grad(*args))
    opcheck(backend.short_conv_triton_backward, *ops.cotangents(list(backend.short_conv_triton(*args))), *args)


def test_the_compiler_sees_one_operator() -> None:
    ops.assert_compiles_whole(call, draw(ConvSpec("x", T=3), F32))


def test_more_taps_than_registers_are_refused() -> None:
    with pytest.raises(BackendError, match="takes 16 taps at most, not 17"):
        call(**draw(ConvSpec("x", T=1, W=17), F32))


@pytest.mark.skipif(ops.DEVICE != "cpu", reason="on a GPU nobody looks at the offsets")
def test_wrong_offsets_are_named() -> None:
    with pytest.raises(ShapeError, match="cu_seqlens falls from 4 to 2 at index 2"):
        short_conv(torch.zeros(1, 5, 2), torch.zeros(2, 4), cu_seqlens=torch.tensor([0, 4, 2, 5]), backend="triton")


@pytest.mark.parametrize(("offsets", "kept"), [([0, 2, 3], slice(0, 3)), ([2, 5, 5], slice(2, 5))], ids=str)
def test_offsets_that_leave_tokens_out_neither_hang_nor_change_the_others(offsets: list[int], kept: slice) -> None:
    """On a GPU nobody looks at the offsets first."""
    inputs = draw(ConvSpec("x", lengths=(2, 3)), F32)
    given = (inputs["weight"], inputs["initial_state"], torch.tensor(offsets, device=ops.DEVICE), True)
    y, final = backend.forward(inputs["x"], *given)
    inside = given[2] - offsets[0]
    expected, expected_final = backend.forward(inputs["x"][:, kept], *given[:2], inside, True)
    assert torch.equal(y[:, kept], expected)
    assert torch.equal(final, expected_final)
    grads = backend.backward(torch.ones_like(y), torch.ones_like(final), inputs["x"], *given)
    ones = torch.ones_like(expected), torch.ones_like(final)
    expected_grads = backend.backward(*ones, inputs["x"][:, kept], *given[:2], inside, True)
    assert torch.equal(grads[0][:, kept], expected_grads[0])
    assert torch.equal(grads[2], expected_grads[2])


@pytest.mark.parametrize(
    ("rows", "blocks", "length"),
    [(1, 1, 16), (4096, 32, 64), (8192, 32, 128), (2**20, 32, 1024), (70_000 * 4, 32, 1024)],
)
def test_runs_are_as_long_as_leaves_a_gpu_full(rows: int, blocks: int, length: int) -> None:
    assert backend.run_length(rows, blocks) == length


# Decoding.


def step(width: int, dtype: torch.dtype, D: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Return x [3, D], the weight, and a pool of 5 histories."""
    inputs = draw(ConvSpec("step", T=1, B=3, D=D, W=width), dtype)
    pool = torch.randn(5, D, width - 1, generator=torch.Generator().manual_seed(1)).to(ops.DEVICE, dtype)
    return inputs["x"][:, 0].contiguous(), inputs["weight"], pool


@pytest.mark.parametrize("slots", [[4, 0, 2], [-1, 3, 0]], ids=str)
@pytest.mark.parametrize(("width", "dtype"), [(1, F32), (2, F32), (4, F32), (4, BF16), (4, FP16), (16, F32)])
def test_a_step_is_the_many_token_call_and_touches_only_its_slots(
    width: int, dtype: torch.dtype, slots: list[int]
) -> None:
    x, weight, pool = step(width, dtype)
    before = pool.clone()
    y = short_conv_decode(x, weight, pool, torch.tensor(slots, device=ops.DEVICE), backend="triton")
    named = [(row, slot) for row, slot in enumerate(slots) if slot >= 0]
    assert all(y[row].abs().max() == 0 for row, slot in enumerate(slots) if slot < 0)
    for row, slot in named:
        expected, state = call(x=x[row, None, None], weight=weight, initial_state=before[slot, None])
        wide = [t.double() for t in (x[row, None, None], weight, before[slot, None])]
        exact, _ = short_conv(wide[0], wide[1], initial_state=wide[2], backend="reference")
        assert relative_error(y[row], exact[0, 0]) <= tolerance(dtype).output
        assert torch.equal(y[row], expected[0, 0])
        assert torch.equal(pool[slot], state[0])
    untouched = [slot for slot in range(5) if slot not in slots]
    assert torch.equal(pool[untouched], before[untouched])


def test_a_step_of_many_channels_in_a_strided_pool_of_another_dtype() -> None:
    x, weight, pool = step(4, BF16, D=131)
    pool, slots = pool.float(), torch.tensor([2, 0, 1], dtype=torch.int32, device=ops.DEVICE)
    spread, expected = ops.strided(pool), pool.clone()
    y = short_conv_decode(ops.strided(x), ops.strided(weight), spread, ops.strided(slots), backend="triton")
    ops.assert_close(y, short_conv_decode(x, weight, expected, slots, backend="reference"))
    assert torch.equal(spread, expected)


def test_a_slot_outside_of_the_pool_is_skipped_by_the_kernel() -> None:
    """On a GPU nobody looks at the slots first."""
    x, weight, pool = step(4, F32)
    before = pool.clone()
    with ops.nan_in_new_memory():
        y = backend.step(x, weight, pool, torch.tensor([5, 2**31, -2], device=ops.DEVICE), True)
    assert torch.equal(y, torch.zeros_like(x))
    assert torch.equal(pool, before)


@pytest.mark.skipif(ops.DEVICE != "cpu", reason="on a GPU nobody looks at the slots")
@pytest.mark.parametrize(("slots", "message"), [([5, 0, 1], "slots holds 5"), ([1, 1, 0], "names slot 1 twice")])
def test_wrong_slots_are_named(slots: list[int], message: str) -> None:
    x, weight, pool = step(4, F32)
    with pytest.raises(ShapeError, match=message):
        short_conv_decode(x, weight, pool, torch.tensor(slots), backend="triton")


def test_a_step_passes_opcheck_and_refuses_gradients() -> None:
    x, weight, pool = step(4, F32)
    slots = torch.tensor([2, -1, 0], device=ops.DEVICE)
    opcheck(backend.short_conv_decode_triton, x, weight, pool, slots, True)
    with pytest.raises(BackendError, match="updates histories in place"):
        short_conv_decode(x, weight.requires_grad_(), pool, slots, backend="triton")


def test_a_batch_of_no_sequence_changes_nothing() -> None:
    x, weight, pool = step(4, F32)
    before = pool.clone()
    empty = torch.zeros(0, dtype=torch.int32, device=ops.DEVICE)
    assert short_conv_decode(x[:0], weight, pool, empty, backend="triton").shape == (0, 6)
    assert torch.equal(pool, before)


def test_the_kernels_run_only_when_asked_for_by_name() -> None:
    inputs = draw(dataclasses.replace(PACKED, lengths=(1, 1)), F32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        short_conv(**inputs)
        call(**inputs)
    ran = [event.key for event in profile.events() if event.key.startswith("kimi_linear::short_conv")]
    assert [key == "kimi_linear::short_conv_triton" for key in ran] == [False, True]
