"""What holds for the native experts alone: bits that nothing around a token changes, float32 tensors in autocast."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_linear.base.numerics import relative_error, tolerance
from kimi_linear.ops import grouped_mlp
from kimi_linear.ops.moe.cpu import grouped_mlp_cpu, grouped_mlp_cpu_backward
from kimi_linear.ops.moe.specs import MoESpec
from support import ops

pytestmark = ops.NATIVE

# Runs of more rows than are packed at once, of fewer, and of none; widths that are no multiples of a vector.
LONG = MoESpec("long", M=450, E=4, k=2, D=37, F=45, shunned=(2,))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def native(**arguments: Any) -> Tensor:
    return grouped_mlp(**arguments, backend="cpu")


def in_autocast(**arguments: Any) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return native(**arguments)


@DTYPES
def test_long_runs_match_the_float64_reference(dtype: torch.dtype) -> None:
    ops.assert_matches_reference(grouped_mlp, LONG.inputs(dtype), "cpu", dtype)


@DTYPES
def test_wide_experts_match_the_float64_reference(dtype: torch.dtype) -> None:
    # Products with more than one block of k, and gradients of weights in more than one item.
    spec = MoESpec("wide", M=70, E=2, k=1, D=600, F=290)
    ops.assert_matches_reference(grouped_mlp, spec.inputs(dtype), "cpu", dtype)


@DTYPES
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_bits_do_not_depend_on_the_number_of_threads(threads: int, dtype: torch.dtype) -> None:
    inputs, before = LONG.inputs(dtype), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = ops.run_with_gradients(native, inputs)
        torch.set_num_threads(threads)
        ops.assert_equal(ops.run_with_gradients(native, inputs), expected)
    finally:
        torch.set_num_threads(before)


@DTYPES
def test_the_bits_of_a_token_do_not_depend_on_the_other_tokens(dtype: torch.dtype) -> None:
    inputs = LONG.inputs(dtype)
    d_o = ops.cotangents([torch.empty(450, 37, dtype=dtype)])[0]
    (o,), grads = ops.run_with_gradients(native, inputs, [d_o])
    # One token, a few, and enough for a run to be cut differently.
    for begin, end in [(0, 1), (449, 450), (100, 107), (3, 400)]:
        part = inputs | {name: inputs[name][begin:end] for name in ("x", "weights", "experts")}
        (alone,), part_grads = ops.run_with_gradients(native, part, [d_o[begin:end]])
        assert torch.equal(alone, o[begin:end])
        for name in ("x", "weights"):
            assert torch.equal(part_grads[name], grads[name][begin:end]), name


@pytest.mark.parametrize("M", [2, 97, 450])
def test_an_expert_named_twice_by_many_tokens_counts_twice(M: int) -> None:
    # Rows of one token stand side by side in a run, also where a run is cut.
    inputs = MoESpec("twice", M=M, E=2, D=16, F=20).inputs(torch.float32)
    inputs["experts"] = torch.ones_like(inputs["experts"])
    inputs["experts"][::5, 0] = 0
    ops.assert_matches_reference(grouped_mlp, inputs, "cpu", torch.float32)


@pytest.mark.parametrize("low", ["x", "w1 w3 w2", "w1", "weights"])
def test_autocast_takes_any_mixture_of_dtypes(low: str) -> None:
    inputs = MoESpec("mixed", M=40, D=24, F=20).inputs(torch.float32)
    # Values that bfloat16 holds, so that the dtype they arrive in changes nothing.
    inputs |= {name: inputs[name].bfloat16().float() for name in ("x", "w1", "w3", "w2", "weights")}
    mixed = inputs | {name: inputs[name].bfloat16() for name in low.split()}
    (o,), grads = ops.run_with_gradients(in_autocast, inputs)
    (same,), same_grads = ops.run_with_gradients(in_autocast, mixed)
    assert o.dtype == same.dtype == torch.bfloat16
    assert torch.equal(o, same)
    for name, grad in same_grads.items():
        assert grad.dtype == mixed[name].dtype, name
        assert relative_error(grad, grads[name]) <= tolerance(torch.bfloat16).gradient, name


def test_gradients_of_float32_tensors_are_not_rounded_in_autocast() -> None:
    _, grads = ops.run_with_gradients(in_autocast, LONG.inputs(torch.float32))
    for name in ("x", "w1", "w3", "w2", "weights"):
        assert grads[name].dtype == torch.float32
        assert not torch.equal(grads[name], grads[name].bfloat16().float()), name


def test_bfloat16_is_closer_to_the_truth_than_rounding_every_product() -> None:
    inputs = MoESpec("error", M=200, D=64, F=48).inputs(torch.bfloat16)
    expected = grouped_mlp(**ops.in_float64(inputs), backend="reference")
    native_error = relative_error(native(**inputs), expected)
    assert native_error < relative_error(grouped_mlp(**inputs, backend="grouped"), expected)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("spec", [LONG, MoESpec("no_token", M=0)], ids=lambda spec: spec.name)
def test_custom_ops_pass_opcheck(spec: MoESpec, low: bool) -> None:
    args = tuple(spec.inputs(torch.float32).values())
    ops.opcheck(grouped_mlp_cpu, *args, False, low)
    ops.opcheck(grouped_mlp_cpu, *ops.requiring_grad(*args), True, low)
    o, h = grouped_mlp_cpu(*args, True, low)
    ops.opcheck(grouped_mlp_cpu_backward, torch.randn_like(o), *args, h)


@DTYPES
def test_autocast_compiles_whole(dtype: torch.dtype) -> None:
    ops.assert_compiles_whole(in_autocast, MoESpec("compiled", M=13).inputs(dtype))


def test_nothing_is_kept_without_a_backward() -> None:
    args = tuple(LONG.inputs(torch.float32).values())
    assert grouped_mlp_cpu(*args, False, False)[1].shape == (0, 90)
    assert grouped_mlp_cpu(*args, True, True)[1].shape == (900, 90)
