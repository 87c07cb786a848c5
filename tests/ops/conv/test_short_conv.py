import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kimi_linear.base.errors import BackendError, ConfigError, DtypeError, ShapeError
from kimi_linear.ops import short_conv
from kimi_linear.ops.conv import chunk, cpu, reference
from kimi_linear.ops.conv.specs import SPECS, ConvSpec
from support import ops

BACKENDS = ops.backends("short_conv")
CASES = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
EACH_FLOAT64 = pytest.mark.parametrize("backend", ops.backends("short_conv", torch.float64))
EACH_DTYPE = pytest.mark.parametrize(("backend", "dtype"), ops.backend_dtypes("short_conv"))
# The widest dtype that a backend runs.
WIDEST = {backend: dtype for dtype in (torch.float32, torch.float64) for backend in ops.backends("short_conv", dtype)}
BY_NAME = {spec.name: spec for spec in SPECS}
PACKED = [spec for spec in SPECS if spec.lengths is not None]
EACH_TILE = pytest.mark.usefixtures("tile")


@pytest.fixture(params=[1 << 17, 1], ids=["one_tile", "smallest_tiles"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    # One element a tile gives the least height there is, so that short sequences cross tiles too.
    monkeypatch.setattr(chunk, "_TILE_ELEMENTS", request.param)


@EACH_TILE
@CASES
@EACH_DTYPE
def test_backend_matches_the_float64_reference(backend: str, dtype: torch.dtype, spec: ConvSpec) -> None:
    ops.assert_matches_reference(short_conv, spec.inputs(dtype), backend, dtype)


@EACH_TILE
@pytest.mark.parametrize(
    "spec", [s for s in SPECS if s.name in ("T2", "linear", "packed_empty_middle", "one_tap")], ids=lambda s: s.name
)
@EACH_FLOAT64
def test_gradients_match_finite_differences(backend: str, spec: ConvSpec) -> None:
    assert ops.gradcheck(lambda **a: short_conv(**a, backend=backend), spec.inputs(torch.float64))


@EACH_BACKEND
def test_unpacked_call_is_torchs_causal_convolution(backend: str) -> None:
    inputs = ConvSpec("plain", B=2, T=9, initial_state=False).inputs(WIDEST[backend])
    x, weight = inputs["x"], inputs["weight"]
    padded = F.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0))
    expected = F.silu(F.conv1d(padded, weight.unsqueeze(1), groups=x.shape[2])).transpose(1, 2)
    y, state = short_conv(**inputs, backend=backend)
    ops.assert_close(y, expected)
    assert torch.equal(state, padded[:, :, -(weight.shape[1] - 1) :])


@EACH_TILE
@EACH_BACKEND
@pytest.mark.parametrize("split", range(10))
def test_a_call_cut_anywhere_equals_the_whole(backend: str, split: int) -> None:
    inputs = ConvSpec("whole", B=2, T=9).inputs(WIDEST[backend])
    y, state = short_conv(**inputs, backend=backend)
    head, middle = short_conv(**{**inputs, "x": inputs["x"][:, :split]}, backend=backend)
    tail, end = short_conv(**{**inputs, "x": inputs["x"][:, split:], "initial_state": middle}, backend=backend)
    ops.assert_close(torch.cat([head, tail], 1), y)
    assert torch.equal(end, state)


@EACH_TILE
@pytest.mark.parametrize("spec", PACKED, ids=lambda spec: spec.name)
@EACH_BACKEND
def test_packed_sequences_equal_separate_calls(backend: str, spec: ConvSpec) -> None:
    inputs = spec.inputs(WIDEST[backend])
    y, state = short_conv(**inputs, backend=backend)
    offsets = inputs.pop("cu_seqlens").tolist()
    for n, (start, stop) in enumerate(itertools.pairwise(offsets)):
        before = None if inputs["initial_state"] is None else inputs["initial_state"][n : n + 1]
        alone = {**inputs, "x": inputs["x"][:, start:stop], "initial_state": before}
        y_alone, state_alone = short_conv(**alone, backend=backend)
        ops.assert_close(y[:, start:stop], y_alone)
        assert torch.equal(state[n], state_alone[0])


@EACH_BACKEND
def test_an_empty_sequence_returns_its_state_unchanged(backend: str) -> None:
    inputs = BY_NAME["packed_empty_middle"].inputs(torch.bfloat16)
    _, state = short_conv(**inputs, backend=backend)
    assert torch.equal(state[1:3], inputs["initial_state"][1:3])


@EACH_BACKEND
def test_changing_a_token_changes_nothing_before_it(backend: str) -> None:
    inputs = ConvSpec("causal", T=12).inputs(torch.float32)
    y, _ = short_conv(**inputs, backend=backend)
    changed = inputs["x"].clone()
    changed[:, 7] = 1e4
    other, _ = short_conv(**{**inputs, "x": changed}, backend=backend)
    assert torch.equal(other[:, :7], y[:, :7])
    assert not torch.equal(other[:, 7], y[:, 7])


@EACH_TILE
@EACH_BACKEND
def test_the_gradient_of_the_final_state_alone_reaches_its_inputs(backend: str) -> None:
    inputs = ConvSpec("tail", T=2).inputs(WIDEST[backend])
    outputs, _ = ops.run_with_gradients(short_conv, inputs)
    grads = [torch.zeros_like(outputs[0]), torch.ones_like(outputs[1])]
    _, found = ops.run_with_gradients(lambda **a: short_conv(**a, backend=backend), inputs, grads)
    # Two tokens push the oldest two of three inputs out of the state.
    assert torch.equal(found["x"], torch.ones_like(found["x"]))
    assert found["initial_state"][0, 0].tolist() == [0, 0, 1]
    assert found["weight"].abs().max() == 0


@pytest.mark.parametrize("name", ["x", "weight", "initial_state"])
@EACH_BACKEND
def test_a_gradient_of_one_input_alone_equals_that_of_all(backend: str, name: str) -> None:
    inputs = BY_NAME["packed_ragged"].inputs(WIDEST[backend])
    _, every = ops.run_with_gradients(lambda **a: short_conv(**a, backend=backend), inputs)
    _, one = ops.run_with_gradients(lambda **a: short_conv(**a, backend=backend), inputs, wanted=[name])
    assert list(one) == [name]
    assert torch.equal(one[name], every[name])


@EACH_BACKEND
def test_weight_of_a_torch_convolution_is_accepted(backend: str) -> None:
    inputs = BY_NAME["T17"].inputs(torch.float32)
    y, _ = short_conv(**inputs, backend=backend)
    deep = {**inputs, "weight": inputs["weight"].unsqueeze(1)}
    outputs, grads = ops.run_with_gradients(lambda **a: short_conv(**a, backend=backend), deep)
    assert torch.equal(outputs[0], y)
    assert grads["weight"].shape == (6, 1, 4)


@EACH_BACKEND
def test_mixed_dtypes_keep_each_gradient_in_its_own(backend: str) -> None:
    inputs = BY_NAME["batch"].inputs(torch.bfloat16)
    inputs["weight"] = inputs["weight"].float()
    ops.assert_matches_reference(short_conv, inputs, backend, torch.bfloat16)
    y, state = short_conv(**inputs, backend=backend)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.bfloat16)


@EACH_BACKEND
def test_autocast_changes_nothing(backend: str) -> None:
    inputs = BY_NAME["packed_ragged"].inputs(torch.float32)
    plain = ops.run_with_gradients(lambda **a: short_conv(**a, backend=backend), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ops.assert_equal(ops.run_with_gradients(lambda **a: short_conv(**a, backend=backend), inputs), plain)


@EACH_TILE
@pytest.mark.parametrize("name", ["batch", "packed_empty_middle"])
@EACH_BACKEND
def test_inputs_strides_and_repeated_runs(backend: str, name: str) -> None:
    def call(**arguments: Any) -> Any:
        return short_conv(**arguments, backend=backend)

    inputs = BY_NAME[name].inputs(torch.float32)
    ops.assert_inputs_unchanged(call, inputs)
    ops.assert_strides_do_not_matter(call, inputs, torch.float32)
    ops.assert_runs_are_identical(call, inputs)


@pytest.mark.parametrize("name", ["batch", "no_state", "packed_empty_middle"])
@EACH_BACKEND
def test_the_call_compiles_whole(backend: str, name: str) -> None:
    ops.assert_compiles_whole(lambda **a: short_conv(**a, backend=backend), BY_NAME[name].inputs(torch.float32))


@pytest.mark.parametrize("name", ["batch", "no_state", "packed_ragged", "linear"])
@pytest.mark.parametrize(
    ("forward", "backward"),
    [
        (reference.short_conv_reference, reference.short_conv_reference_backward),
        (chunk.short_conv_chunk, chunk.short_conv_chunk_backward),
        pytest.param(cpu.short_conv_cpu, cpu.short_conv_cpu_backward, marks=ops.NATIVE),
    ],
    ids=["reference", "chunk", "cpu"],
)
def test_custom_ops_pass_opcheck(forward: Any, backward: Any, name: str) -> None:
    inputs = BY_NAME[name].inputs(torch.float32)
    args = (inputs["x"], inputs["weight"], inputs["initial_state"], inputs["cu_seqlens"], name != "linear")
    ops.opcheck(forward, *ops.requiring_grad(*args))
    ops.opcheck(backward, *(torch.randn_like(y) for y in forward(*args)), *args)


@EACH_BACKEND
def test_many_sequences_run_as_many_operations_as_few(backend: str) -> None:
    def operations(sequences: int) -> int:
        inputs = ConvSpec("ones", lengths=(1,) * sequences, D=2).inputs(torch.float32)
        return ops.profile(lambda: ops.run_with_gradients(lambda **a: short_conv(**a, backend=backend), inputs))[0]

    # Of its own accord torch adds a few where a tensor is large.
    assert operations(5000) <= operations(5) + 10


@pytest.mark.parametrize("length", [64, 4096])
def test_the_chunk_backend_holds_no_temporary_beyond_a_tile(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk, "_TILE_ELEMENTS", 1 << 12)
    inputs = ConvSpec("long", lengths=(length,) * (4096 // length), D=64, initial_state=False).inputs(torch.bfloat16)
    _, largest = ops.profile(lambda: short_conv(**inputs, backend="chunk"))
    # The result in bfloat16, and not one float32 tensor of its size.
    assert largest == inputs["x"].numel() * 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 6)}, ShapeError, r"short_conv: x is \[3, 6\], expected \[any, any, any\] \(B, T, D\)"),
        ({"weight": torch.zeros(5, 4)}, ShapeError, r"weight is \[5, 4\], expected \[6, any\] \(D, W\)"),
        ({"weight": torch.zeros(6, 2, 4)}, ShapeError, r"weight is \[6, 2, 4\], expected \[6, 1, any\] \(D, 1, W\)"),
        ({"weight": torch.zeros(6, 4, dtype=torch.int64)}, DtypeError, "weight is torch.int64, expected float32"),
        ({"initial_state": torch.zeros(1, 6, 4)}, ShapeError, r"initial_state is \[1, 6, 4\], expected \[2, 6, 3\]"),
        ({"activation": "relu"}, ConfigError, "activation is 'relu', expected 'silu' or None"),
        ({"backend": "nonesuch"}, BackendError, "unknown backend 'nonesuch'"),
        ({"cu_seqlens": torch.tensor([0, 3])}, ShapeError, "B is 2 with cu_seqlens, expected 1"),
        ({"cu_seqlens": torch.tensor([0.0, 3.0])}, DtypeError, "cu_seqlens is torch.float32, expected int64 or int32"),
        ({"cu_seqlens": torch.tensor([3])}, ShapeError, r"cu_seqlens is \[1\], expected \[N \+ 1\]"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = ConvSpec("right", B=2, T=3).inputs(torch.float32)
    with pytest.raises(error, match=message):
        short_conv(**{**inputs, **change})


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 2, 4], "cu_seqlens runs from 0 to 4, expected from 0 to T = 5"),
        ([1, 2, 5], "cu_seqlens runs from 1 to 5"),
        ([0, 4, 2, 5], "cu_seqlens falls from 4 to 2 at index 2"),
    ],
)
@EACH_BACKEND
def test_wrong_offsets_are_named(backend: str, offsets: list[int], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        short_conv(torch.zeros(1, 5, 2), torch.zeros(2, 4), cu_seqlens=torch.tensor(offsets), backend=backend)
