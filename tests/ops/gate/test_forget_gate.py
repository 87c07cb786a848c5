from typing import Any

import pytest
import torch

from kimi_linear.base.errors import ConfigError, DtypeError, ShapeError
from kimi_linear.ops import forget_gate
from kimi_linear.ops.gate.cpu import forget_gate_cpu, forget_gate_cpu_backward
from kimi_linear.ops.gate.reference import forget_gate_reference, forget_gate_reference_backward
from kimi_linear.ops.gate.specs import SPECS, GateSpec
from support import ops

CASES = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
EACH_BACKEND = pytest.mark.parametrize("backend", ops.backends("forget_gate"))
EACH_FLOAT64 = pytest.mark.parametrize("backend", ops.backends("forget_gate", torch.float64))
EACH_DTYPE = pytest.mark.parametrize(("backend", "dtype"), ops.backend_dtypes("forget_gate"))
BY_NAME = {spec.name: spec for spec in SPECS}
SOME = pytest.mark.parametrize("name", ["softplus", "bounded", "bounded_without_rate", "scalar"])
# A_log and dt_bias gather every token.
SUMS = ("A_log", "dt_bias")


def equation(x: torch.Tensor, A_log: Any, dt_bias: Any, lower_bound: float | None, heads: tuple[int, ...]) -> Any:
    """Return the gate as its equation reads; `heads` is (HV, K) or (HV,)."""
    u = x if dt_bias is None else x + dt_bias.view(heads)
    rate = 1.0 if A_log is None else A_log.exp().view(heads[0], *[1] * (len(heads) - 1))
    # torch's softplus drops e^-u above u = 20; this one does not.
    softplus = torch.logaddexp(u, torch.zeros_like(u))
    return -rate * softplus if lower_bound is None else lower_bound * torch.sigmoid(rate * u)


@CASES
@EACH_DTYPE
def test_backend_matches_the_float64_reference(backend: str, dtype: torch.dtype, spec: GateSpec) -> None:
    ops.assert_matches_reference(forget_gate, spec.inputs(dtype), backend, dtype, gate_gradients=SUMS)


@CASES
def test_reference_is_the_equation(spec: GateSpec) -> None:
    inputs = spec.inputs(torch.float64)
    heads = (spec.HV,) if spec.K is None else (spec.HV, spec.K)
    outputs, grads = ops.run_with_gradients(forget_gate, inputs)
    expected, expected_grads = ops.run_with_gradients(lambda **a: equation(**a, heads=heads), inputs)
    ops.assert_close(outputs[0], expected[0])
    for name, grad in grads.items():
        ops.assert_close(grad, expected_grads[name])


@SOME
@EACH_FLOAT64
def test_gradients_match_finite_differences(backend: str, name: str) -> None:
    assert ops.gradcheck(lambda **a: forget_gate(**a, backend=backend), BY_NAME[name].inputs(torch.float64))


@pytest.mark.parametrize("lower_bound", [None, -5.0])
@EACH_DTYPE
def test_extreme_logits_stay_finite_and_never_positive(
    backend: str, dtype: torch.dtype, lower_bound: float | None
) -> None:
    x = torch.tensor([-1e4, -200.0, -50.0, -8.0, 0.0, 8.0, 50.0, 200.0, 1e4], dtype=dtype).view(9, 1, 1)
    inputs = {"x": x, "A_log": torch.tensor([4.0]), "dt_bias": torch.tensor([8.0]), "lower_bound": lower_bound}
    outputs, grads = ops.run_with_gradients(lambda **a: forget_gate(**a, backend=backend), inputs)
    for tensor in (*outputs, *grads.values()):
        assert tensor.isfinite().all()
    assert (outputs[0] <= 0).all()
    if lower_bound is not None:
        assert (outputs[0] >= lower_bound).all()


@EACH_BACKEND
def test_softplus_keeps_small_decays(backend: str) -> None:
    y = forget_gate(torch.full((1, 1, 1), -60.0), torch.zeros(1), torch.zeros(1), backend=backend)
    assert float(y) == pytest.approx(-8.75651076e-27, rel=1e-5)


@EACH_BACKEND
def test_half_precision_logits_give_a_float32_decay(backend: str) -> None:
    inputs = BY_NAME["softplus"].inputs(torch.bfloat16)
    assert forget_gate(**inputs, backend=backend).dtype == torch.float32
    outputs = ops.run_with_gradients(lambda **a: forget_gate(**a, backend=backend), inputs)[0]
    wide = forget_gate(**{**inputs, "x": inputs["x"].float()}, backend=backend)
    assert torch.equal(outputs[0], wide)


def test_one_decay_a_head_equals_one_channel_a_head() -> None:
    inputs = BY_NAME["scalar"].inputs(torch.float32)
    wide = {**inputs, "x": inputs["x"].unsqueeze(-1)}
    assert torch.equal(forget_gate(**inputs), forget_gate(**wide).squeeze(-1))


@SOME
@EACH_BACKEND
def test_autocast_changes_nothing(backend: str, name: str) -> None:
    inputs = BY_NAME[name].inputs(torch.float32)
    plain = ops.run_with_gradients(lambda **a: forget_gate(**a, backend=backend), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ops.assert_equal(ops.run_with_gradients(lambda **a: forget_gate(**a, backend=backend), inputs), plain)


@SOME
@EACH_BACKEND
def test_inputs_strides_and_repeated_runs(backend: str, name: str) -> None:
    def call(**arguments: Any) -> Any:
        return forget_gate(**arguments, backend=backend)

    inputs = BY_NAME[name].inputs(torch.float32)
    ops.assert_inputs_unchanged(call, inputs)
    ops.assert_strides_do_not_matter(call, inputs, torch.float32)
    ops.assert_runs_are_identical(call, inputs)


@pytest.mark.parametrize("wanted", ["x", "A_log", "dt_bias"])
@SOME
def test_a_gradient_of_one_input_alone_equals_that_of_all(name: str, wanted: str) -> None:
    inputs = BY_NAME[name].inputs(torch.float32)
    if inputs[wanted] is None:
        return
    every = ops.run_with_gradients(forget_gate, inputs)[1]
    one = ops.run_with_gradients(forget_gate, inputs, wanted=[wanted])[1]
    assert torch.equal(one[wanted], every[wanted])


@SOME
@EACH_BACKEND
def test_the_call_compiles_whole(backend: str, name: str) -> None:
    ops.assert_compiles_whole(lambda **a: forget_gate(**a, backend=backend), BY_NAME[name].inputs(torch.float32))


@pytest.mark.parametrize("name", ["softplus", "bounded", "bounded_without_rate", "bounded_without_rate_or_bias"])
@pytest.mark.parametrize(
    ("forward", "backward"),
    [
        (forget_gate_reference, forget_gate_reference_backward),
        pytest.param(forget_gate_cpu, forget_gate_cpu_backward, marks=ops.NATIVE),
    ],
    ids=["reference", "cpu"],
)
def test_custom_ops_pass_opcheck(forward: Any, backward: Any, name: str) -> None:
    inputs = BY_NAME[name].inputs(torch.float32)
    args = (inputs["x"].flatten(0, -3), inputs["A_log"], inputs["dt_bias"], inputs["lower_bound"])
    ops.opcheck(forward, *ops.requiring_grad(*args))
    ops.opcheck(backward, torch.randn_like(args[0]), *args)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"A_log": None}, ConfigError, "A_log is None in the softplus form"),
        ({"A_log": torch.zeros(4)}, ShapeError, r"forget_gate: A_log is \[4\], expected \[3\] \(HV\)"),
        ({"dt_bias": torch.zeros(5)}, ShapeError, r"dt_bias is \[5\] and x is \[2, 5, 3, 4\], expected \[HV \* K\]"),
        ({"dt_bias": torch.zeros(3, 4)}, ShapeError, r"dt_bias is \[3, 4\], expected \[any\]"),
        ({"x": torch.zeros(3), "dt_bias": None}, ShapeError, r"x is \[3\], expected \[..., HV, K\]"),
        ({"x": torch.zeros(2, 3, 4, dtype=torch.int64)}, DtypeError, "x is torch.int64, expected float32"),
        ({"lower_bound": 0.0}, ConfigError, "lower_bound is 0.0, expected a number below 0"),
        ({"lower_bound": float("nan")}, ConfigError, "lower_bound is nan"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        forget_gate(**{**BY_NAME["softplus"].inputs(torch.float32), **change})
