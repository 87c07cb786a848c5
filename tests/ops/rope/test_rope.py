import math
from typing import Any

import pytest
import torch

from kimi_linear.base.errors import BackendError, ConfigError, DeviceError, DtypeError, ShapeError
from kimi_linear.ops import apply_rope
from kimi_linear.ops.rope.cpu import rope_cpu
from kimi_linear.ops.rope.reference import rope_reference
from kimi_linear.ops.rope.specs import SPECS, RopeSpec
from support import ops

EACH_SPEC = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
EACH_BACKEND = pytest.mark.parametrize("backend", ops.backends("rope"))
EACH_FLOAT64 = pytest.mark.parametrize("backend", ops.backends("rope", torch.float64))
EACH_DTYPE = pytest.mark.parametrize(("backend", "dtype"), ops.backend_dtypes("rope"))
# The widest dtype that a backend runs.
WIDEST = {backend: dtype for dtype in (torch.float32, torch.float64) for backend in ops.backends("rope", dtype)}
BY_NAME = {spec.name: spec for spec in SPECS}


@EACH_SPEC
@EACH_DTYPE
def test_backend_matches_the_float64_reference(backend: str, dtype: torch.dtype, spec: RopeSpec) -> None:
    ops.assert_matches_reference(apply_rope, spec.inputs(dtype), backend, dtype)


@EACH_FLOAT64
def test_each_pair_turns_by_the_angle_of_its_position(backend: str) -> None:
    inputs = RopeSpec("pairs", T=3, K=6, H=1, theta=100.0).inputs(torch.float64)
    x, y = inputs["x"][0, :, 0], apply_rope(**inputs, backend=backend)[0, :, 0]
    for t in range(3):
        for i in range(3):
            turned = complex(x[t, i], x[t, i + 3]) * complex(
                math.cos(t * 100 ** (-i / 3)), math.sin(t * 100 ** (-i / 3))
            )
            assert abs(complex(y[t, i], y[t, i + 3]) - turned) < 1e-14


@pytest.mark.parametrize("name", ["own_positions", "two_channels"])
@EACH_FLOAT64
def test_gradients_match_finite_differences(backend: str, name: str) -> None:
    inputs = BY_NAME[name].inputs(torch.float64)
    assert ops.gradcheck(lambda **a: apply_rope(**a, backend=backend), inputs)
    x = inputs.pop("x").requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: apply_rope(x, **inputs, backend=backend).square(), x)


@EACH_BACKEND
def test_position_zero_changes_nothing(backend: str) -> None:
    x = RopeSpec("zero", T=4, B=2).inputs(torch.float32)["x"]
    assert torch.equal(apply_rope(x, torch.zeros(4, dtype=torch.int64), theta=1e4, backend=backend), x)


@EACH_BACKEND
def test_rotation_keeps_lengths(backend: str) -> None:
    inputs = BY_NAME["own_positions"].inputs(WIDEST[backend])
    ops.assert_close(apply_rope(**inputs, backend=backend).norm(dim=-1), inputs["x"].norm(dim=-1))


@pytest.mark.parametrize("shift", [1, 1000, 1_000_000])
@EACH_FLOAT64
def test_scores_depend_on_the_difference_of_positions_only(backend: str, shift: int) -> None:
    inputs = BY_NAME["shared_positions"].inputs(torch.float64)
    moved = {**inputs, "positions": inputs["positions"] + shift}

    def scores(arguments: dict[str, Any]) -> torch.Tensor:
        y = apply_rope(**arguments, backend=backend)
        return torch.einsum("bthk,bshk->bhts", y, y)

    torch.testing.assert_close(scores(moved), scores(inputs), rtol=0, atol=1e-7)


@EACH_BACKEND
def test_one_list_of_positions_serves_the_batch(backend: str) -> None:
    inputs = BY_NAME["shared_positions"].inputs(torch.float32)
    both = {**inputs, "positions": inputs["positions"].int().expand(2, -1)}
    assert torch.equal(apply_rope(**both, backend=backend), apply_rope(**inputs, backend=backend))


@EACH_BACKEND
def test_autocast_changes_nothing(backend: str) -> None:
    inputs = BY_NAME["own_positions"].inputs(torch.float32)
    plain = ops.run_with_gradients(lambda **a: apply_rope(**a, backend=backend), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ops.assert_equal(ops.run_with_gradients(lambda **a: apply_rope(**a, backend=backend), inputs), plain)


@pytest.mark.parametrize("name", ["shared_positions", "own_positions"])
@EACH_BACKEND
def test_inputs_strides_and_repeated_runs(backend: str, name: str) -> None:
    def call(**arguments: Any) -> Any:
        return apply_rope(**arguments, backend=backend)

    inputs = BY_NAME[name].inputs(torch.float32)
    ops.assert_inputs_unchanged(call, inputs)
    ops.assert_strides_do_not_matter(call, inputs, torch.float32)
    ops.assert_runs_are_identical(call, inputs)


@pytest.mark.parametrize("name", ["shared_positions", "own_positions"])
@EACH_BACKEND
def test_the_call_compiles_whole(backend: str, name: str) -> None:
    ops.assert_compiles_whole(lambda **a: apply_rope(**a, backend=backend), BY_NAME[name].inputs(torch.float32))


@pytest.mark.parametrize("name", ["shared_positions", "own_positions", "empty"])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("op", [rope_reference, pytest.param(rope_cpu, marks=ops.NATIVE)], ids=["reference", "cpu"])
def test_custom_op_passes_opcheck(op: Any, inverse: bool, name: str) -> None:
    inputs = BY_NAME[name].inputs(torch.float32)
    ops.opcheck(op, *ops.requiring_grad(inputs["x"]), inputs["positions"], 1e4, inverse)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 5, 8)}, ShapeError, r"rope: x is \[2, 5, 8\], expected .* \(B, T, H, K\)"),
        ({"x": torch.zeros(2, 5, 2, 7)}, ShapeError, "x has 7 channels, expected an even number"),
        ({"positions": torch.arange(4)}, ShapeError, r"positions is \[4\], expected \[5\] \(T\)"),
        ({"positions": torch.zeros(1, 5).long()}, ShapeError, r"positions is \[1, 5\], expected \[2, 5\] \(B, T\)"),
        ({"positions": torch.tensor(3)}, ShapeError, r"positions is \[\], expected \[5\] \(T\)"),
        ({"positions": torch.zeros(5)}, DtypeError, "positions is torch.float32, expected int64 or int32"),
        ({"positions": torch.arange(5, device="meta")}, DeviceError, "positions is on meta but x is on cpu"),
        ({"x": torch.zeros(2, 5, 2, 8).int()}, DtypeError, "x is torch.int32, expected float32"),
        ({"theta": 0.0}, ConfigError, "theta is 0.0, expected a positive number"),
        ({"theta": math.nan}, ConfigError, "theta is nan, expected a positive number"),
        ({"backend": "nonesuch"}, BackendError, "unknown backend 'nonesuch'"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        apply_rope(**{**RopeSpec("right", T=5, B=2).inputs(torch.float32), **change})
