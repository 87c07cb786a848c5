from typing import Any

import pytest
import torch

from kimi_linear.base.errors import ShapeError
from kimi_linear.base.numerics import relative_error, tolerance
from kimi_linear.ops.linear import cpu, linear, reference
from kimi_linear.ops.linear.specs import SPECS, LinearSpec
from support import ops

EACH = pytest.mark.parametrize("backend", ops.backends("linear"))
CASES = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
BIASED = next(spec for spec in SPECS if spec.name == "batch")
NATIVE = pytest.mark.parametrize("backend", [pytest.param("cpu", marks=ops.NATIVE)])


def call(backend: str, **arguments: Any) -> torch.Tensor:
    return linear(**arguments, backend=backend)


@CASES
@pytest.mark.parametrize(("backend", "dtype"), ops.backend_dtypes("linear"), ids=str)
def test_backend_matches_the_float64_reference(backend: str, dtype: torch.dtype, spec: LinearSpec) -> None:
    ops.assert_matches_reference(linear, spec.inputs(dtype), backend, dtype)


# Odd sizes around the widths of tiles, panels, steps and blocks at every level.
@pytest.mark.parametrize("M", [1, 3, 7, 12, 13, 49, 193])
@pytest.mark.parametrize("N", [1, 7, 31, 33, 65])
def test_odd_sizes_match_float64(M: int, N: int) -> None:
    for K in (1, 2, 17, 33, 127, 257, 513):
        for dtype in (torch.float32, torch.bfloat16):
            inputs = LinearSpec("odd", (M,), N, K, has_bias=True).inputs(dtype, seed=K)
            ops.assert_matches_reference(linear, inputs, ops.backends("linear", dtype)[0], dtype)


@pytest.mark.parametrize("spec", [s for s in SPECS if s.name in ("bias", "batch", "vector", "no_row")])
def test_gradients_match_finite_differences(spec: LinearSpec) -> None:
    assert ops.gradcheck(linear, spec.inputs(torch.float64))


@EACH
def test_wide_weights_are_rounded_to_x_and_keep_their_gradient_wide(backend: str) -> None:
    inputs = LinearSpec("wide", (96,), 40, 64, has_bias=True).inputs(torch.float32)
    mixed = {**inputs, "x": inputs["x"].bfloat16()}
    (y,), grads = ops.run_with_gradients(lambda **a: call(backend, **a), mixed)
    assert y.dtype == grads["x"].dtype == torch.bfloat16
    assert grads["weight"].dtype == grads["bias"].dtype == torch.float32
    rounded = {name: value.bfloat16() for name, value in mixed.items()}
    (same,), _ = ops.run_with_gradients(lambda **a: call(backend, **a), rounded)
    assert relative_error(y, same) <= tolerance(torch.bfloat16).output


@NATIVE
def test_gradient_of_a_wide_weight_is_a_float32_sum(backend: str) -> None:
    inputs = LinearSpec("wide", (640,), 40, 64).inputs(torch.float32)
    inputs["x"] = inputs["x"].bfloat16()
    grad = torch.randn(640, 40).bfloat16()
    _, grads = ops.run_with_gradients(lambda **a: call(backend, **a), inputs, [grad])
    assert relative_error(grads["weight"], grad.double().t() @ inputs["x"].double()) < 1e-6


@EACH
def test_autocast_casts_x_and_leaves_the_weight(backend: str) -> None:
    inputs = BIASED.inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = ops.run_with_gradients(lambda **a: call(backend, **a), inputs)
    assert plain[0][0].dtype == torch.bfloat16
    assert {name: grad.dtype for name, grad in plain[1].items()} == dict.fromkeys(inputs, torch.float32)
    cast = ops.run_with_gradients(lambda x, **a: call(backend, x=x.bfloat16(), **a), inputs)
    ops.assert_equal(plain, cast)


@EACH
def test_only_needed_gradients_are_there(backend: str) -> None:
    inputs = BIASED.inputs(torch.float32)
    _, every = ops.run_with_gradients(lambda **a: call(backend, **a), inputs)
    for name in inputs:
        _, some = ops.run_with_gradients(lambda **a: call(backend, **a), inputs, wanted=[name])
        assert list(some) == [name]
        assert torch.equal(some[name], every[name])


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_the_batch(backend: str, dtype: torch.dtype) -> None:
    inputs = LinearSpec("long", (401,), 71, 1030).inputs(dtype)
    y = call(backend, **inputs)
    for first, last in [(0, 1), (5, 6), (400, 401), (90, 97), (13, 206)]:
        part = call(backend, x=inputs["x"][first:last], weight=inputs["weight"])
        assert torch.equal(part, y[first:last])


@NATIVE
def test_threads_do_not_matter(backend: str) -> None:
    inputs = LinearSpec("threads", (301,), 130, 77, has_bias=True).inputs(torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.run_with_gradients(lambda **a: call(backend, **a), inputs))
    finally:
        torch.set_num_threads(before)
    ops.assert_equal(results[0], results[1])
    ops.assert_equal(results[0], results[2])


@EACH
def test_infinities_and_nan_stay_in_their_row_and_column(backend: str) -> None:
    inputs = LinearSpec("extreme", (14,), 40, 33).inputs(torch.float32)
    plain = call(backend, **inputs)
    x, weight = inputs["x"].clone(), inputs["weight"].clone()
    x[3, 5], weight[37, 32] = torch.inf, torch.nan
    y = call(backend, x=x, weight=weight)
    assert not y[3].isfinite().any()
    assert not y[:, 37].isfinite().any()
    rest = torch.arange(14) != 3
    columns = torch.arange(40) != 37
    assert relative_error(y[rest][:, columns], plain[rest][:, columns]) < 1e-6


@EACH
def test_inputs_strides_and_repeated_runs(backend: str) -> None:
    inputs = BIASED.inputs(torch.float32)
    ops.assert_inputs_unchanged(lambda **a: call(backend, **a), inputs)
    ops.assert_strides_do_not_matter(lambda **a: call(backend, **a), inputs, torch.float32)
    ops.assert_runs_are_identical(lambda **a: call(backend, **a), inputs)


@EACH
def test_the_call_compiles_whole(backend: str) -> None:
    ops.assert_compiles_whole(lambda **a: call(backend, **a), BIASED.inputs(torch.float32))


@EACH
def test_custom_ops_pass_opcheck(backend: str) -> None:
    module = {"cpu": cpu, "reference": reference}[backend]
    inputs = BIASED.inputs(torch.float32)
    args = (inputs["x"], inputs["weight"], inputs["bias"])
    ops.opcheck(getattr(module, f"linear_{backend}"), *ops.requiring_grad(*args))
    ops.opcheck(getattr(module, f"linear_{backend}"), args[0], args[1], None)
    ops.opcheck(getattr(module, f"linear_{backend}_backward"), torch.randn(2, 3, 5, 37), *args, [True, False, True])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(5)}, r"linear: x is \[2, 3, 5, 29\] and weight \[5\]"),
        ({"x": torch.zeros(2, 30)}, r"linear: x is \[2, 30\] and weight \[37, 29\], expected \[..., K\] and \[N, K\]"),
        ({"x": torch.zeros(())}, r"linear: x is \[\]"),
        ({"bias": torch.ones(29)}, r"linear: bias is \[29\], expected \[37\]"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        linear(**{**BIASED.inputs(torch.float32), **change})
