from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_linear.base.errors import BackendError, ConfigError, DeviceError, DtypeError, ShapeError
from kimi_linear.base.numerics import relative_error, tolerance
from kimi_linear.ops import route
from kimi_linear.ops.moe.cpu_router import moe_route_cpu, moe_route_cpu_backward
from kimi_linear.ops.moe.router import moe_route_reference, moe_route_reference_backward
from kimi_linear.ops.moe.specs import SPECS, MoESpec
from support import ops

EACH_SPEC = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
EACH_BACKEND = pytest.mark.parametrize("backend", ops.backends("moe_route"))
EACH_FLOAT64 = pytest.mark.parametrize("backend", ops.backends("moe_route", torch.float64))
OPS = {
    "reference": (moe_route_reference, moe_route_reference_backward),
    "cpu": (moe_route_cpu, moe_route_cpu_backward),
}
EACH_ACTIVATION = pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
EACH_NORM = pytest.mark.parametrize("renormalize", [True, False])
BY_NAME = {spec.name: spec for spec in SPECS}


def written_out(
    logits: Tensor,
    bias: Tensor,
    top_k: int,
    renormalize: bool = True,
    scaling: float = 1.0,
    activation: str = "sigmoid",
    biased_combine: bool = False,
) -> Tensor:
    """Return the weights by the equations, differentiable by torch."""
    scores = logits.sigmoid() if activation == "sigmoid" else logits.softmax(-1)
    biased = scores + bias.detach()
    weights = (biased if biased_combine else scores).gather(-1, biased.detach().argsort(-1, descending=True)[:, :top_k])
    return scaling * (weights / weights.sum(-1, keepdim=True) if renormalize else weights)


def only_weights(backend: str, **arguments: Any) -> Tensor:
    return route(**arguments, backend=backend)[0]


@EACH_SPEC
@EACH_ACTIVATION
@EACH_NORM
@EACH_FLOAT64
def test_weights_and_gradient_are_the_equations(
    backend: str, renormalize: bool, activation: str, spec: MoESpec
) -> None:
    inputs = spec.route(torch.float64) | {"renormalize": renormalize, "scaling": 2.446, "activation": activation}
    weights, grads = ops.run_with_gradients(lambda **a: only_weights(backend, **a), inputs, wanted=["logits"])
    expected, expected_grads = ops.run_with_gradients(written_out, inputs, wanted=["logits"])
    ops.assert_close(weights[0], expected[0])
    # With every weight equal by construction the gradient is zero, and rounding is all there is to compare.
    torch.testing.assert_close(grads["logits"], expected_grads["logits"], rtol=1e-10, atol=1e-14)


@EACH_ACTIVATION
@EACH_NORM
@pytest.mark.parametrize(("backend", "dtype"), ops.backend_dtypes("moe_route"), ids=str)
def test_weights_with_the_bias_follow_the_equations(
    backend: str, dtype: torch.dtype, renormalize: bool, activation: str
) -> None:
    inputs = MoESpec("biased", M=13, E=9, k=3).route(dtype) | {"renormalize": renormalize, "activation": activation}
    inputs |= {"bias": torch.linspace(0.3, -0.2, 9), "scaling": 2.446, "biased_combine": True}
    weights, grads = ops.run_with_gradients(lambda **a: only_weights(backend, **a), inputs, wanted=["logits"])
    exact = ops.in_float64(inputs)
    expected, _ = ops.run_with_gradients(written_out, exact, wanted=["logits"])
    d_logits = torch.autograd.functional.vjp(
        lambda logits: written_out(**{**exact, "logits": logits}), exact["logits"], ops.cotangents(weights)[0].double()
    )[1]
    assert relative_error(weights[0], expected[0]) <= tolerance(weights[0].dtype).output
    assert relative_error(grads["logits"], d_logits) <= tolerance(dtype).gradient
    plain = route(**{**inputs, "biased_combine": False}, backend=backend)
    assert relative_error(weights[0], plain[0]) > 0.01
    assert torch.equal(route(**inputs, backend=backend)[1], plain[1])


@EACH_SPEC
@pytest.mark.parametrize(("backend", "dtype"), ops.backend_dtypes("moe_route"), ids=str)
@EACH_ACTIVATION
@EACH_NORM
def test_backend_matches_the_float64_reference(
    renormalize: bool, activation: str, backend: str, dtype: torch.dtype, spec: MoESpec
) -> None:
    inputs = spec.route(dtype) | {"renormalize": renormalize, "scaling": 2.446, "activation": activation}

    def call(**arguments: Any) -> Tensor:
        return only_weights(**arguments)

    if renormalize and spec.k == 1:
        # The weight is the scaling whatever the logits: the gradient is zero up to rounding.
        weights, grads = ops.run_with_gradients(lambda **a: call(backend=backend, **a), inputs, wanted=["logits"])
        torch.testing.assert_close(weights[0], torch.full_like(weights[0], 2.446))
        torch.testing.assert_close(grads["logits"], torch.zeros_like(grads["logits"]), rtol=0.0, atol=1e-6)
    else:
        ops.assert_matches_reference(call, inputs, backend, dtype, wanted=["logits"])


@pytest.mark.parametrize(("backend", "dtype"), ops.backend_dtypes("moe_route"), ids=str)
@EACH_ACTIVATION
def test_half_precision_logits_are_scored_wide(backend: str, activation: str, dtype: torch.dtype) -> None:
    inputs = BY_NAME["prime"].route(dtype) | {"activation": activation}
    weights, experts = route(**inputs, backend=backend)
    expected, expected_experts = route(**ops.in_float64(inputs), backend="reference")
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert experts.dtype == torch.int64
    assert torch.equal(experts, expected_experts)
    assert relative_error(weights, expected) <= tolerance(weights.dtype).output


@EACH_ACTIVATION
@EACH_NORM
@EACH_FLOAT64
def test_gradient_matches_finite_differences(backend: str, renormalize: bool, activation: str) -> None:
    inputs = MoESpec("small", M=3, E=4).route(torch.float64)
    bias, options = inputs.pop("bias"), {"renormalize": renormalize, "activation": activation, "scaling": 0.7}
    assert ops.gradcheck(lambda **a: only_weights(backend, **a, **options, bias=bias), inputs)


@EACH_BACKEND
def test_the_bias_selects_and_does_not_weigh(backend: str) -> None:
    logits, bias = torch.tensor([[2.0, 1.0, -3.0]]), torch.tensor([0.0, 0.0, 5.0])
    weights, experts = route(logits, bias, top_k=2, renormalize=False, backend=backend)
    assert experts.tolist() == [[2, 0]]
    assert torch.equal(weights, logits.sigmoid()[:, [2, 0]])


@EACH_BACKEND
def test_no_gradient_reaches_the_bias_nor_a_logit_that_was_not_chosen(backend: str) -> None:
    logits = torch.tensor([[2.0, 1.0, -3.0]], requires_grad=True)
    bias = torch.zeros(3, requires_grad=True)
    weights, experts = route(logits, bias, top_k=2, renormalize=False, backend=backend)
    weights.sum().backward()
    assert bias.grad is None
    assert not experts.requires_grad
    assert logits.grad is not None
    assert logits.grad[0, 2] == 0
    assert (logits.grad[0, :2] > 0).all()


@EACH_BACKEND
def test_renormalised_weights_sum_to_the_scaling(backend: str) -> None:
    weights, _ = route(**BY_NAME["prime"].route(torch.float32), scaling=2.446, backend=backend)
    torch.testing.assert_close(weights.sum(-1), torch.full((13,), 2.446))


@EACH_BACKEND
def test_scores_that_underflow_give_zero_weights_and_finite_gradients(backend: str) -> None:
    logits = torch.full((2, 3), -500.0, requires_grad=True)
    weights, _ = route(logits, torch.zeros(3), top_k=2, backend=backend)
    weights.sum().backward()
    assert torch.equal(weights, torch.zeros(2, 2))
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@EACH_BACKEND
def test_inputs_strides_and_repeated_runs(backend: str) -> None:
    def call(logits: Tensor, **arguments: Any) -> Any:
        return only_weights(backend, logits=logits, bias=BY_NAME["prime"].route(torch.float32)["bias"], **arguments)

    inputs = BY_NAME["prime"].route(torch.float32)
    del inputs["bias"]
    ops.assert_inputs_unchanged(call, inputs)
    ops.assert_strides_do_not_matter(call, inputs, torch.float32)
    ops.assert_runs_are_identical(call, inputs)


@EACH_BACKEND
def test_autocast_changes_nothing(backend: str) -> None:
    inputs = BY_NAME["prime"].route(torch.float32)
    call = {"function": lambda **a: only_weights(backend, **a), "arguments": inputs, "wanted": ["logits"]}
    plain = ops.run_with_gradients(**call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ops.assert_equal(ops.run_with_gradients(**call), plain)


@EACH_BACKEND
def test_the_call_compiles_whole(backend: str) -> None:
    inputs = BY_NAME["prime"].route(torch.float32)
    bias = inputs.pop("bias")
    ops.assert_compiles_whole(lambda **a: only_weights(backend, bias=bias, **a), inputs)


@EACH_ACTIVATION
@EACH_NORM
@EACH_BACKEND
def test_custom_ops_pass_opcheck(backend: str, renormalize: bool, activation: str) -> None:
    forward, backward = OPS[backend]
    inputs = BY_NAME["prime"].route(torch.float32)
    logits, bias = inputs["logits"], inputs["bias"]
    ops.opcheck(forward, logits.requires_grad_(), bias, 2, renormalize, 0.5, activation)
    weights, experts = forward(logits.detach(), bias, 2, renormalize, 0.5, activation)
    ops.opcheck(backward, weights, logits.detach(), experts, renormalize, 0.5, activation)


@pytest.mark.parametrize("E", [1, 7, 16, 40, 256])
@EACH_ACTIVATION
@EACH_BACKEND
def test_experts_are_chosen_as_by_a_stable_sort(backend: str, activation: str, E: int) -> None:
    generator = torch.Generator().manual_seed(E)
    logits = torch.randn(150, E, generator=generator)
    bias = 0.1 * torch.randn(E, generator=generator)
    top_k = min(E, 8)
    _, experts = route(logits, bias, top_k=top_k, activation=activation, backend=backend)
    scores = logits.double().sigmoid() if activation == "sigmoid" else logits.double().softmax(-1)
    assert torch.equal(experts, (scores + bias).argsort(dim=-1, descending=True, stable=True)[:, :top_k])


@ops.NATIVE
@EACH_ACTIVATION
def test_natively_the_lowest_index_comes_first_among_equals(activation: str) -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    _, experts = route(logits, torch.zeros(5), top_k=3, activation=activation, backend="cpu")
    assert experts.tolist() == [[1, 3, 0], [0, 1, 2]]


@EACH_BACKEND
def test_a_logit_that_is_not_a_number_is_chosen_and_seen(backend: str) -> None:
    logits = torch.zeros(1, 20)
    logits[0, 17] = torch.nan
    weights, experts = route(logits, torch.zeros(20), top_k=2, backend=backend)
    assert experts[0, 0] == 17
    assert weights.isnan().all()


@EACH_BACKEND
def test_a_token_does_not_depend_on_its_neighbours(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, bias = torch.randn(150, 20, generator=generator), torch.zeros(20)
    weights, experts = route(logits, bias, top_k=3, activation="softmax", backend=backend)
    for m in (0, 63, 64, 149):
        one, chosen = route(logits[m : m + 1], bias, top_k=3, activation="softmax", backend=backend)
        assert torch.equal(one[0], weights[m])
        assert torch.equal(chosen[0], experts[m])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(2, 3, 5)}, ShapeError, r"route: logits is \[2, 3, 5\], expected \[any, any\] \(M, E\)"),
        ({"bias": torch.zeros(4)}, ShapeError, r"bias is \[4\], expected \[5\] \(E\)"),
        ({"top_k": 0}, ShapeError, "top_k is 0, expected 1 to 5"),
        ({"top_k": 6}, ShapeError, "top_k is 6, expected 1 to 5"),
        ({"activation": "relu"}, ConfigError, "activation is 'relu', expected one of sigmoid, softmax"),
        ({"logits": torch.zeros(3, 5).long()}, DtypeError, "logits is torch.int64, expected float32"),
        ({"bias": torch.zeros(5, device="meta")}, DeviceError, "bias is on meta but logits is on cpu"),
        ({"backend": "nonesuch"}, BackendError, "unknown backend 'nonesuch'"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        route(**{**BY_NAME["prime"].route(torch.float32), **change})
