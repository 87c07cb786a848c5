from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kimi_linear.base.errors import BackendError, DeviceError, DtypeError, ShapeError
from kimi_linear.ops import swiglu
from kimi_linear.ops.swiglu.cpu import swiglu_cpu, swiglu_cpu_backward
from kimi_linear.ops.swiglu.reference import swiglu_reference, swiglu_reference_backward
from kimi_linear.ops.swiglu.specs import SPECS, SwiGLUSpec
from support import ops

EACH_SPEC = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
EACH_BACKEND = pytest.mark.parametrize("backend", ops.backends("swiglu"))
BY_NAME = {spec.name: spec for spec in SPECS}
OPS = {"reference": (swiglu_reference, swiglu_reference_backward), "cpu": (swiglu_cpu, swiglu_cpu_backward)}


@EACH_SPEC
@pytest.mark.parametrize(("backend", "dtype"), ops.backend_dtypes("swiglu"), ids=str)
def test_backend_matches_the_float64_reference(backend: str, dtype: torch.dtype, spec: SwiGLUSpec) -> None:
    ops.assert_matches_reference(swiglu, spec.inputs(dtype), backend, dtype)


@EACH_SPEC
def test_reference_is_the_equation(spec: SwiGLUSpec) -> None:
    inputs = spec.inputs(torch.float64)
    outputs, grads = ops.run_with_gradients(lambda **a: swiglu(**a, backend="reference"), inputs)
    expected, expected_grads = ops.run_with_gradients(lambda gate, up: F.silu(gate) * up, inputs)
    ops.assert_close(outputs[0], expected[0])
    for name, grad in grads.items():
        ops.assert_close(grad, expected_grads[name])


def test_gradients_match_finite_differences() -> None:
    assert ops.gradcheck(swiglu, SwiGLUSpec("small", (3, 4)).inputs(torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@EACH_BACKEND
def test_extreme_gates_stay_finite(backend: str, dtype: torch.dtype) -> None:
    gate = torch.tensor([-1e30, -1e4, -200.0, -110.0, 0.0, 88.0, 1e4, 1e30], dtype=dtype)
    inputs = {"gate": gate, "up": torch.full_like(gate, 2.0)}
    (y,), grads = ops.run_with_gradients(lambda **a: swiglu(**a, backend=backend), inputs)
    expected = torch.where(gate > 0, 2 * gate, 0.0)
    torch.testing.assert_close(y, expected.to(dtype), rtol=0.0, atol=1e-30)
    torch.testing.assert_close(grads["up"], (expected / 2).to(dtype) * ops.cotangents([y])[0], atol=1e-30, rtol=1e-2)
    assert grads["gate"].isfinite().all()


@ops.NATIVE
def test_natively_an_element_does_not_depend_on_where_it_stands() -> None:
    inputs = BY_NAME["pieces"].inputs(torch.float32)
    whole = swiglu(**inputs, backend="cpu")
    parts = [swiglu(*(t[:, i : i + 117] for t in inputs.values()), backend="cpu") for i in range(0, 8193, 117)]
    assert torch.equal(torch.cat(parts, dim=1), whole)


@EACH_BACKEND
def test_inputs_strides_and_repeated_runs(backend: str) -> None:
    def call(**arguments: Any) -> Any:
        return swiglu(**arguments, backend=backend)

    inputs = BY_NAME["prime"].inputs(torch.float32)
    ops.assert_inputs_unchanged(call, inputs)
    ops.assert_strides_do_not_matter(call, inputs, torch.float32)
    ops.assert_runs_are_identical(call, inputs)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_native_result_does_not_depend_on_the_threads(threads: int) -> None:
    inputs = BY_NAME["pieces"].inputs(torch.bfloat16)
    before, expected = torch.get_num_threads(), ops.run_with_gradients(swiglu, inputs)
    torch.set_num_threads(threads)
    try:
        ops.assert_equal(ops.run_with_gradients(swiglu, inputs), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["prime", "empty"])
@EACH_BACKEND
def test_the_call_compiles_whole_and_passes_opcheck(backend: str, name: str) -> None:
    inputs = BY_NAME[name].inputs(torch.float32)
    ops.assert_compiles_whole(lambda **a: swiglu(**a, backend=backend), inputs)
    forward, backward = OPS[backend]
    ops.opcheck(forward, *ops.requiring_grad(*inputs.values()))
    ops.opcheck(backward, inputs["up"], *inputs.values())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"up": torch.zeros(7, 12)}, ShapeError, r"swiglu: up is \[7, 12\], expected \[7, 13\], the shape of gate"),
        ({"up": torch.zeros(7, 13).double()}, DtypeError, "up is torch.float64 but gate is torch.float32"),
        ({"gate": torch.zeros(7, 13).long()}, DtypeError, "gate is torch.int64, expected float32"),
        ({"up": torch.zeros(7, 13, device="meta")}, DeviceError, "up is on meta but gate is on cpu"),
        ({"backend": "nonesuch"}, BackendError, "unknown backend 'nonesuch'"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        swiglu(**{**BY_NAME["prime"].inputs(torch.float32), **change})
