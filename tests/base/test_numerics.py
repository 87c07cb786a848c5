import math

import pytest
import torch

from kimi_linear.base.numerics import TOLERANCES, relative_error, tolerance


def test_the_error_is_the_ratio_of_root_mean_squares() -> None:
    reference = torch.tensor([3.0, -4.0, 0.0, 0.0], dtype=torch.float64)
    assert relative_error(reference + 0.5, reference) == pytest.approx(0.5 / 2.5, rel=1e-6)
    assert relative_error(reference, reference) == 0.0


def test_the_error_is_taken_in_float64() -> None:
    reference = torch.full((3,), 1e30, dtype=torch.float32)
    # The square of 1e30 is beyond float32.
    assert relative_error(reference * (1 + 1e-3), reference) == pytest.approx(1e-3, rel=1e-3)
    tiny = torch.tensor([1.0 + 1e-12], dtype=torch.float64)
    assert relative_error(tiny, torch.ones(1, dtype=torch.float64)) == pytest.approx(1e-12, rel=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_on_either_side_is_an_infinite_error(bad: float) -> None:
    good, spoiled = torch.ones(3), torch.tensor([1.0, bad, 1.0])
    assert relative_error(spoiled, good) == math.inf
    assert relative_error(good, spoiled) == math.inf
    assert relative_error(spoiled, spoiled) == math.inf


def test_an_error_against_a_zero_reference_is_large_and_finite() -> None:
    zeros = torch.zeros(4)
    assert relative_error(zeros, zeros) == 0.0
    assert 1e4 < relative_error(torch.full((4,), 1e-3), zeros) < math.inf


def test_empty_tensors_agree_and_shapes_must() -> None:
    assert relative_error(torch.empty(0, 3), torch.empty(0, 3)) == 0.0
    with pytest.raises(AssertionError, match=r"shapes differ: \(2,\) and \(1, 2\)"):
        relative_error(torch.ones(2), torch.ones(1, 2))


def test_tensors_that_need_gradients_and_other_dtypes_are_taken() -> None:
    x = torch.ones(2, requires_grad=True)
    assert relative_error(x, torch.ones(2, dtype=torch.bfloat16)) == 0.0
    assert x.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_tolerance_is_found_by_dtype_or_name(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    assert tolerance(dtype) is tolerance(name) is TOLERANCES[name]


def test_a_dtype_without_a_row_is_an_error() -> None:
    with pytest.raises(KeyError):
        tolerance(torch.int64)


def test_tolerances_are_ordered_by_precision_and_within_what_the_field_allows() -> None:
    for row in TOLERANCES.values():
        assert row.output <= row.gradient <= row.gate_gradient
    assert TOLERANCES["float64"].output < TOLERANCES["float32"].output < TOLERANCES["bfloat16"].output
    # The limits of the public test suites of this operator: 5e-3, 8e-3 and 2e-2.
    widest = TOLERANCES["bfloat16"]
    assert widest.output <= 5e-3
    assert widest.gradient <= 8e-3
    assert widest.gate_gradient <= 2e-2
