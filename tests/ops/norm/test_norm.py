from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kimi_linear.base.errors import ConfigError, DtypeError, ShapeError
from kimi_linear.ops import gated_rms_norm, l2_norm, rms_norm
from kimi_linear.ops.norm import cpu, reference
from kimi_linear.ops.norm.specs import SPECS, NormSpec
from support import ops

FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "rms_norm": rms_norm,
    "gated_rms_norm": gated_rms_norm,
    "l2_norm": l2_norm,
}
EACH = pytest.mark.parametrize(("op", "backend"), [(op, backend) for op in FUNCTIONS for backend in ops.backends(op)])
EACH_FLOAT64 = pytest.mark.parametrize(
    ("op", "backend"), [(op, backend) for op in FUNCTIONS for backend in ops.backends(op, torch.float64)]
)
EACH_DTYPE = pytest.mark.parametrize(
    ("op", "backend", "dtype"), [(op, *pair) for op in FUNCTIONS for pair in ops.backend_dtypes(op)]
)
CASES = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
HEADS = next(spec for spec in SPECS if spec.name == "heads_silu")


def draw(spec: NormSpec, op: str, dtype: torch.dtype) -> dict[str, Any]:
    inputs: dict[str, Any] = getattr(spec, op)(dtype)
    return inputs


def equation(op: str, x: torch.Tensor, weight: Any = None, gate: Any = None, activation: str = "sigmoid") -> Any:
    """Return the norm as its equation reads, for float64 inputs."""
    if op == "l2_norm":
        return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    y = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    if op == "rms_norm":
        return y
    return y * (F.silu(gate) if activation == "silu" else gate.sigmoid())


@CASES
@EACH_DTYPE
def test_backend_matches_the_float64_reference(op: str, backend: str, dtype: torch.dtype, spec: NormSpec) -> None:
    ops.assert_matches_reference(FUNCTIONS[op], draw(spec, op, dtype), backend, dtype)


@CASES
@pytest.mark.parametrize("op", FUNCTIONS)
def test_reference_is_the_equation(op: str, spec: NormSpec) -> None:
    inputs = draw(spec, op, torch.float64)
    terms = {name: value for name, value in inputs.items() if name != "eps"}
    outputs, grads = ops.run_with_gradients(FUNCTIONS[op], inputs)
    expected, expected_grads = ops.run_with_gradients(lambda **a: equation(op, **a), terms)
    ops.assert_close(outputs[0], expected[0])
    for name, grad in grads.items():
        ops.assert_close(grad, expected_grads[name])


@pytest.mark.parametrize("spec", [s for s in SPECS if s.name in ("one_row", "heads", "heads_silu", "zero_rows")])
@EACH_FLOAT64
def test_gradients_match_finite_differences(op: str, backend: str, spec: NormSpec) -> None:
    # A zero row bends over the square root of epsilon, far below torch's finite difference unless epsilon is large.
    inputs = {**draw(spec, op, torch.float64), "eps": 0.1}
    assert ops.gradcheck(lambda **a: FUNCTIONS[op](**a, backend=backend), inputs)


@pytest.mark.parametrize("backend", ops.backends("rms_norm"))
def test_rms_norm_rounds_to_the_input_dtype_before_the_weight(backend: str) -> None:
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.rand(96, generator=torch.Generator().manual_seed(1)).bfloat16()
    wide = x.float()
    n = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    y = rms_norm(x, weight, eps=1e-5, backend=backend)
    # Float32 sums in another order move few of the roundings; the other order of cast and weight moves a third.
    assert (y != n.bfloat16() * weight).float().mean() < 0.01
    assert (y != (n * weight).bfloat16()).float().mean() > 0.1


@pytest.mark.parametrize("backend", ops.backends("gated_rms_norm"))
def test_gated_rms_norm_rounds_once_at_the_end(backend: str) -> None:
    inputs = draw(NormSpec("many", (64, 96)), "gated_rms_norm", torch.bfloat16)
    exact = gated_rms_norm(**ops.in_float64(inputs)).bfloat16()
    assert (gated_rms_norm(**inputs, backend=backend) != exact).float().mean() < 0.01


@pytest.mark.parametrize("backend", ops.backends("l2_norm"))
def test_l2_norm_adds_epsilon_inside_the_root(backend: str) -> None:
    y = l2_norm(torch.full((1, 4), 1e-3), backend=backend)
    assert torch.allclose(y, torch.full((1, 4), 1e-3 / 5e-6**0.5), rtol=1e-6, atol=0)


@EACH
def test_weights_wider_than_x_keep_their_dtype_in_the_gradient(op: str, backend: str) -> None:
    inputs = draw(HEADS, op, torch.bfloat16)
    mixed = {name: value.float() if name == "weight" else value for name, value in inputs.items()}
    ops.assert_matches_reference(FUNCTIONS[op], mixed, backend, torch.bfloat16)
    assert FUNCTIONS[op](**mixed, backend=backend).dtype == torch.bfloat16


@EACH
def test_autocast_changes_nothing(op: str, backend: str) -> None:
    inputs = draw(HEADS, op, torch.float32)
    plain = ops.run_with_gradients(lambda **a: FUNCTIONS[op](**a, backend=backend), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ops.assert_equal(ops.run_with_gradients(lambda **a: FUNCTIONS[op](**a, backend=backend), inputs), plain)


@EACH
def test_inputs_strides_and_repeated_runs(op: str, backend: str) -> None:
    def call(**arguments: Any) -> Any:
        return FUNCTIONS[op](**arguments, backend=backend)

    inputs = draw(HEADS, op, torch.float32)
    ops.assert_inputs_unchanged(call, inputs)
    ops.assert_strides_do_not_matter(call, inputs, torch.float32)
    ops.assert_runs_are_identical(call, inputs)


@EACH
def test_the_call_compiles_whole(op: str, backend: str) -> None:
    ops.assert_compiles_whole(lambda **a: FUNCTIONS[op](**a, backend=backend), draw(HEADS, op, torch.float32))


@EACH
def test_custom_ops_pass_opcheck(op: str, backend: str) -> None:
    inputs = draw(HEADS, op, torch.float32)
    args = [inputs[name] for name in ("x", "gate", "weight", "eps") if name in inputs]
    for silu in [True, False] if op == "gated_rms_norm" else [None]:
        each = (*args,) if silu is None else (*args, silu)
        module = {"reference": reference, "cpu": cpu}[backend]
        ops.opcheck(getattr(module, f"{op}_{backend}"), *ops.requiring_grad(*each))
        ops.opcheck(getattr(module, f"{op}_{backend}_backward"), torch.randn_like(inputs["x"]), *each)


@pytest.mark.parametrize(
    ("op", "change", "error", "message"),
    [
        ("rms_norm", {"weight": torch.ones(5)}, ShapeError, r"rms_norm: weight is \[5\], expected \[16\]"),
        ("rms_norm", {"x": torch.zeros(())}, ShapeError, r"rms_norm: x is \[\], expected \[..., D\]"),
        ("rms_norm", {"x": torch.zeros(3, 0)}, ShapeError, r"rms_norm: x is \[3, 0\]"),
        ("rms_norm", {"x": torch.zeros(3, 16, dtype=torch.int32)}, DtypeError, "x is torch.int32, expected float32"),
        ("gated_rms_norm", {"gate": torch.ones(16)}, ShapeError, r"gate is \[16\], expected \[2, 5, 3, 16\]"),
        ("gated_rms_norm", {"activation": "tanh"}, ConfigError, "activation is 'tanh', expected 'sigmoid' or 'silu'"),
        ("l2_norm", {"x": torch.zeros(4, dtype=torch.bool)}, DtypeError, "l2_norm: x is torch.bool"),
    ],
)
def test_wrong_arguments_are_named(op: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FUNCTIONS[op](**{**draw(HEADS, op, torch.float32), **change})
