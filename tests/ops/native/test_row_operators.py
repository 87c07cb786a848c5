"""What the native row operators promise beyond agreeing with the reference: the same bits however the work is cut."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kimi_linear.ops import (
    apply_rope,
    forget_gate,
    gated_rms_norm,
    l2_norm,
    linear_cross_entropy,
    rms_norm,
    short_conv,
    short_conv_decode,
)
from kimi_linear.ops.conv.specs import ConvSpec
from kimi_linear.ops.cross_entropy.specs import CrossEntropySpec
from kimi_linear.ops.gate.specs import GateSpec
from kimi_linear.ops.norm.specs import NormSpec
from kimi_linear.ops.rope.specs import RopeSpec
from support import ops

pytestmark = ops.NATIVE
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

# Large enough for several items of work each.
NORM = NormSpec("rows", (600, 67))
CALLS: dict[str, tuple[Callable[..., Any], Callable[[torch.dtype], dict[str, Any]]]] = {
    "rms_norm": (rms_norm, NORM.rms_norm),
    "gated_rms_norm": (gated_rms_norm, NORM.gated_rms_norm),
    "l2_norm": (l2_norm, NORM.l2_norm),
    "forget_gate": (forget_gate, GateSpec("rows", lead=(600,), HV=3, K=21).inputs),
    "short_conv": (short_conv, ConvSpec("batch", B=3, T=150, D=2051).inputs),
    "short_conv_packed": (short_conv, ConvSpec("packed", lengths=(150, 0, 3, 129), D=2051).inputs),
    "rope": (apply_rope, RopeSpec("tokens", T=70, B=2, H=3, K=70).inputs),
    "cross_entropy": (linear_cross_entropy, CrossEntropySpec("sum", M=150, D=67, V=531, chunk=64).inputs),
    "cross_entropy_rows": (
        linear_cross_entropy,
        CrossEntropySpec("rows", M=150, D=67, V=531, chunk=64, reduction="none", ignored=(3, 77)).inputs,
    ),
}


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@EACH_DTYPE
@pytest.mark.parametrize("name", CALLS)
def test_any_number_of_threads_gives_the_same_bits(name: str, dtype: torch.dtype, threads: Any) -> None:
    function, draw = CALLS[name]
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(ops.run_with_gradients(lambda **a: function(**a, backend="cpu"), draw(dtype)))
    ops.assert_equal(results[1], results[0])
    ops.assert_equal(results[2], results[0])


@EACH_DTYPE
@pytest.mark.parametrize("name", ["rms_norm", "gated_rms_norm", "l2_norm", "forget_gate"])
def test_a_row_does_not_depend_on_the_rows_beside_it(name: str, dtype: torch.dtype) -> None:
    function, draw = CALLS[name]
    inputs = draw(dtype)
    grads = [torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(0))]
    outputs, found = ops.run_with_gradients(lambda **a: function(**a, backend="cpu"), inputs, grads)
    for some in (slice(0, 1), slice(7, 140), slice(599, 600)):
        cut = {key: value[some] if key in ("x", "gate") else value for key, value in inputs.items()}
        alone, alone_grads = ops.run_with_gradients(lambda **a: function(**a, backend="cpu"), cut, [grads[0][some]])
        assert torch.equal(alone[0], outputs[0][some])
        for key in {"x", "gate"} & found.keys():
            assert torch.equal(alone_grads[key], found[key][some])


@EACH_DTYPE
@pytest.mark.parametrize("split", [1, 3, 32, 65, 149])
def test_a_convolution_cut_anywhere_gives_the_same_bits(split: int, dtype: torch.dtype) -> None:
    inputs = ConvSpec("whole", T=150, D=2051).inputs(dtype)
    y, state = short_conv(**inputs, backend="cpu")
    head, middle = short_conv(**{**inputs, "x": inputs["x"][:, :split]}, backend="cpu")
    tail, end = short_conv(**{**inputs, "x": inputs["x"][:, split:], "initial_state": middle}, backend="cpu")
    assert torch.equal(torch.cat([head, tail], 1), y)
    assert torch.equal(end, state)


@EACH_DTYPE
def test_a_packed_sequence_gives_the_bits_of_a_sequence_alone(dtype: torch.dtype) -> None:
    lengths = (37, 150, 0, 2, 90)
    inputs = ConvSpec("packed", lengths=lengths, D=67).inputs(dtype)
    grads = ops.cotangents(list(short_conv(**inputs, backend="cpu")))
    outputs, found = ops.run_with_gradients(lambda **a: short_conv(**a, backend="cpu"), inputs, grads)
    start = 0
    for n, length in enumerate(lengths):
        span = slice(start, start + length)
        alone = {**inputs, "x": inputs["x"][:, span], "initial_state": inputs["initial_state"][n : n + 1]}
        own = [grads[0][:, span], grads[1][n : n + 1]]
        y, own_found = ops.run_with_gradients(
            lambda **a: short_conv(**a, backend="cpu"), {**alone, "cu_seqlens": None}, own
        )
        assert torch.equal(y[0], outputs[0][:, span])
        assert torch.equal(y[1], outputs[1][n : n + 1])
        assert torch.equal(own_found["x"], found["x"][:, span])
        assert torch.equal(own_found["initial_state"], found["initial_state"][n : n + 1])
        start += length


@EACH_DTYPE
@pytest.mark.parametrize("width", [1, 2, 4, 5])
def test_decoding_gives_the_bits_of_the_many_token_call(width: int, dtype: torch.dtype) -> None:
    inputs = ConvSpec("whole", B=2, T=9, D=67, W=width).inputs(dtype)
    y, state = short_conv(**inputs, backend="cpu")
    pool, slots = inputs["initial_state"].clone(), torch.tensor([0, 1])
    steps = [short_conv_decode(inputs["x"][:, t], inputs["weight"], pool, slots, backend="cpu") for t in range(9)]
    assert torch.equal(torch.stack(steps, 1), y)
    assert torch.equal(pool, state)


def test_a_convolution_of_more_taps_than_the_kernel_takes_is_refused_with_the_reason() -> None:
    inputs = ConvSpec("long", W=17, T=5).inputs(torch.float32)
    with pytest.raises(Exception, match="takes 16 taps at most, not 17"):
        short_conv(**inputs, backend="cpu")
    ops.assert_matches_reference(short_conv, inputs, "chunk", torch.float32)


@EACH_DTYPE
def test_a_slice_of_the_last_axis_is_read_where_it_lies(dtype: torch.dtype) -> None:
    wide = torch.randn(5, 7, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    part, weight = wide[..., 8:72], torch.rand(64)
    expected = rms_norm(part.contiguous(), weight, eps=1e-5, backend="cpu")
    assert torch.equal(rms_norm(part, weight, eps=1e-5, backend="cpu"), expected)
    taps = torch.rand(64, 4)
    assert torch.equal(short_conv(part, taps, backend="cpu")[0], short_conv(part.contiguous(), taps, backend="cpu")[0])


@EACH_DTYPE
def test_a_row_loss_does_not_depend_on_the_other_rows(dtype: torch.dtype) -> None:
    inputs = CrossEntropySpec("rows", M=150, D=67, V=531, reduction="none").inputs(dtype)
    whole = linear_cross_entropy(**inputs, backend="cpu")
    for some in (slice(0, 1), slice(11, 70), slice(100, 150)):
        cut = {**inputs, "hidden": inputs["hidden"][some], "labels": inputs["labels"][some]}
        assert torch.equal(linear_cross_entropy(**cut, backend="cpu"), whole[some])


def test_logits_keep_float32_between_bfloat16_operands() -> None:
    inputs = CrossEntropySpec("rows", M=64, D=64, V=300, spread=8.0, reduction="none").inputs(torch.bfloat16)
    exact = linear_cross_entropy(**ops.in_float64(inputs), backend="reference")
    errors = {
        backend: (linear_cross_entropy(**inputs, backend=backend) - exact).abs().max() for backend in ("cpu", "chunk")
    }
    assert errors["cpu"] < 1e-4 < errors["chunk"]
