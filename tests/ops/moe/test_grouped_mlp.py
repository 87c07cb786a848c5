from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.base.errors import BackendError, DeviceError, DtypeError, ShapeError
from kimi_linear.ops import grouped_mlp
from kimi_linear.ops.moe import grouped, reference
from kimi_linear.ops.moe.specs import SPECS, MoESpec
from support import ops

EACH_SPEC = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
EACH_BACKEND = pytest.mark.parametrize("backend", ops.backends("grouped_mlp"))
EACH_FLOAT64 = pytest.mark.parametrize("backend", ops.backends("grouped_mlp", torch.float64))
EACH_BFLOAT16 = pytest.mark.parametrize("backend", ops.backends("grouped_mlp", torch.bfloat16))
BY_NAME = {spec.name: spec for spec in SPECS}


def written_out(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Return the equation token by token and choice by choice, differentiable by torch."""
    rows = []
    for token, weight, choice in zip(x, weights, experts.tolist(), strict=True):
        said = [w2[e] @ (F.silu(w1[e] @ token) * (w3[e] @ token)) for e in choice]
        rows.append(sum(w * y for w, y in zip(weight, said, strict=True)))
    return torch.stack(rows)


@EACH_SPEC
@pytest.mark.parametrize(("backend", "dtype"), ops.backend_dtypes("grouped_mlp"), ids=str)
def test_backend_matches_the_float64_reference(backend: str, dtype: torch.dtype, spec: MoESpec) -> None:
    ops.assert_matches_reference(grouped_mlp, spec.inputs(dtype), backend, dtype)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.M], ids=lambda spec: spec.name)
@EACH_FLOAT64
def test_outputs_and_gradients_are_the_equation_written_out(backend: str, spec: MoESpec) -> None:
    inputs = spec.inputs(torch.float64)
    (o,), grads = ops.run_with_gradients(lambda **a: grouped_mlp(**a, backend=backend), inputs)
    (expected,), expected_grads = ops.run_with_gradients(written_out, inputs)
    ops.assert_close(o, expected)
    for name, grad in grads.items():
        ops.assert_close(grad, expected_grads[name])


@EACH_FLOAT64
def test_gradients_match_finite_differences(backend: str) -> None:
    inputs = MoESpec("small", M=3, E=3, D=2, F=3, shunned=(1,)).inputs(torch.float64)
    assert ops.gradcheck(lambda **a: grouped_mlp(**a, backend=backend), inputs)


@EACH_BACKEND
def test_experts_without_tokens_get_gradients_of_exactly_zero(backend: str) -> None:
    inputs = BY_NAME["unused_experts"].inputs(torch.float32)
    with ops.nan_in_new_memory():
        _, grads = ops.run_with_gradients(lambda **a: grouped_mlp(**a, backend=backend), inputs)
    for name in ("w1", "w3", "w2"):
        assert torch.equal(grads[name][[0, 3]], torch.zeros_like(grads[name][[0, 3]]))
        assert all(grads[name][e].abs().max() > 0 for e in (1, 2, 4))


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=ops.NATIVE), "grouped"])
def test_an_expert_without_tokens_is_not_read(backend: str) -> None:
    def call(**arguments: Any) -> Any:
        return grouped_mlp(**arguments, backend=backend)

    inputs = BY_NAME["unused_experts"].inputs(torch.float32)
    plain = ops.run_with_gradients(call, inputs)
    for name in ("w1", "w3", "w2"):
        inputs[name][[0, 3]] = torch.nan
    ops.assert_equal(ops.run_with_gradients(call, inputs), plain)


@EACH_BACKEND
def test_no_token_gives_no_output_and_zero_gradients(backend: str) -> None:
    inputs = BY_NAME["no_token"].inputs(torch.float32)
    (o,), grads = ops.run_with_gradients(lambda **a: grouped_mlp(**a, backend=backend), inputs)
    assert o.shape == (0, 6)
    assert all(torch.equal(grad, torch.zeros_like(inputs[name])) for name, grad in grads.items())


@EACH_BACKEND
def test_a_token_does_not_depend_on_its_neighbours(backend: str) -> None:
    inputs = BY_NAME["prime"].inputs(torch.float32)
    o = grouped_mlp(**inputs, backend=backend)
    for m in range(13):
        alone = {name: inputs[name][m : m + 1] for name in ("x", "weights", "experts")}
        ops.assert_close(grouped_mlp(**{**inputs, **alone}, backend=backend), o[m : m + 1])
    noisy = inputs["x"].clone()
    noisy[5] = torch.nan
    other = grouped_mlp(**{**inputs, "x": noisy}, backend=backend)
    assert torch.equal(other[:5], o[:5])
    assert torch.equal(other[6:], o[6:])


@EACH_FLOAT64
def test_the_order_of_tokens_does_not_matter(backend: str) -> None:
    inputs = BY_NAME["prime"].inputs(torch.float64)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    shuffled = {name: inputs[name][order] for name in ("x", "weights", "experts")}
    ops.assert_close(
        grouped_mlp(**{**inputs, **shuffled}, backend=backend), grouped_mlp(**inputs, backend=backend)[order]
    )


@EACH_FLOAT64
def test_an_expert_named_twice_counts_twice(backend: str) -> None:
    inputs = MoESpec("twice", M=2).inputs(torch.float64)
    inputs["experts"] = torch.tensor([[3, 3], [1, 1]])
    once = {"weights": inputs["weights"].sum(-1, keepdim=True), "experts": inputs["experts"][:, :1]}
    ops.assert_close(grouped_mlp(**inputs, backend=backend), grouped_mlp(**{**inputs, **once}, backend=backend))


@EACH_FLOAT64
def test_one_expert_is_a_plain_gated_mlp(backend: str) -> None:
    inputs = MoESpec("dense", M=7, E=1, k=1).inputs(torch.float64)
    x, w1, w3, w2 = (inputs[name] for name in ("x", "w1", "w3", "w2"))
    expected = inputs["weights"] * F.linear(F.silu(F.linear(x, w1[0])) * F.linear(x, w3[0]), w2[0])
    ops.assert_close(grouped_mlp(**inputs, backend=backend), expected)


@EACH_BFLOAT16
def test_int32_experts_and_weights_in_the_dtype_of_x_are_accepted(backend: str) -> None:
    inputs = BY_NAME["prime"].inputs(torch.bfloat16)
    inputs["weights"] = inputs["weights"].bfloat16()
    wide = grouped_mlp(**{**inputs, "weights": inputs["weights"].float()}, backend=backend)
    assert torch.equal(grouped_mlp(**{**inputs, "experts": inputs["experts"].int()}, backend=backend), wide)
    ops.assert_matches_reference(grouped_mlp, inputs, backend, torch.bfloat16)


@pytest.mark.parametrize("name", ["x", "w1", "weights"])
@EACH_BACKEND
def test_a_gradient_of_one_input_alone_equals_that_of_all(backend: str, name: str) -> None:
    inputs = BY_NAME["prime"].inputs(torch.float32)
    _, every = ops.run_with_gradients(lambda **a: grouped_mlp(**a, backend=backend), inputs)
    _, one = ops.run_with_gradients(lambda **a: grouped_mlp(**a, backend=backend), inputs, wanted=[name])
    assert torch.equal(one[name], every[name])


@EACH_BFLOAT16
def test_autocast_is_a_cast_of_tokens_and_experts(backend: str) -> None:
    inputs = BY_NAME["prime"].inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (o,), grads = ops.run_with_gradients(lambda **a: grouped_mlp(**a, backend=backend), inputs)
    low = {name: inputs[name].bfloat16() for name in ("x", "w1", "w3", "w2")}
    (expected,), expected_grads = ops.run_with_gradients(
        lambda **a: grouped_mlp(**a, backend=backend), {**inputs, **low}
    )
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, expected)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        # Gradients of float32 tensors may keep the digits that those of bfloat16 ones lose.
        assert torch.equal(grad.to(expected_grads[name].dtype), expected_grads[name])


@pytest.mark.parametrize("name", ["prime", "unused_experts"])
@EACH_BACKEND
def test_inputs_strides_and_repeated_runs(backend: str, name: str) -> None:
    def call(**arguments: Any) -> Any:
        return grouped_mlp(**arguments, backend=backend)

    inputs = BY_NAME[name].inputs(torch.float32)
    ops.assert_inputs_unchanged(call, inputs)
    ops.assert_strides_do_not_matter(call, inputs, torch.float32)
    ops.assert_runs_are_identical(call, inputs)


@pytest.mark.parametrize("name", ["prime", "unused_experts", "no_token"])
@EACH_BACKEND
def test_the_call_compiles_whole(backend: str, name: str) -> None:
    ops.assert_compiles_whole(lambda **a: grouped_mlp(**a, backend=backend), BY_NAME[name].inputs(torch.float32))


@pytest.mark.parametrize("name", ["prime", "unused_experts", "no_token"])
@pytest.mark.parametrize("keep", [True, False])
def test_custom_ops_pass_opcheck(keep: bool, name: str) -> None:
    args = tuple(BY_NAME[name].inputs(torch.float32).values())
    d_o = torch.randn_like(args[0])
    ops.opcheck(reference.grouped_mlp_reference, *ops.requiring_grad(*args))
    ops.opcheck(reference.grouped_mlp_reference_backward, d_o, *args)
    if keep:
        _, h1, h3 = grouped.grouped_mlp_grouped(*args, keep)
        ops.opcheck(grouped.grouped_mlp_grouped, *ops.requiring_grad(*args), keep)
        ops.opcheck(grouped.grouped_mlp_grouped_backward, d_o, *args, h1, h3)
    else:
        ops.opcheck(grouped.grouped_mlp_grouped, *args, keep)


def test_activations_are_kept_only_for_a_backward() -> None:
    inputs = BY_NAME["prime"].inputs(torch.float32)
    saved: list[Tensor] = []

    def remember(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        grouped_mlp(**{**inputs, "x": inputs["x"].requires_grad_()}, backend="grouped")
        kept = [tuple(t.shape) for t in saved]
        # M * k rows of F.
        assert kept.count((26, 7)) == 2
        assert sum(t.numel() for t in saved) == sum(t.numel() for t in inputs.values()) + 2 * 26 * 7
        saved.clear()
        with torch.no_grad():
            grouped_mlp(**inputs, backend="grouped")
    assert saved == []


def test_runs_cover_every_assignment_once_in_the_order_of_experts() -> None:
    experts = torch.tensor([[4, 1], [1, 0], [4, 4]])
    plan = grouped.plan_runs(experts, E=6)
    assert plan.runs == [(0, slice(0, 1)), (1, slice(1, 3)), (4, slice(3, 6))]
    assert plan.order.tolist() == [3, 1, 2, 0, 4, 5]
    assert plan.token.tolist() == [1, 0, 1, 0, 2, 2]
    assert torch.equal(plan.order[plan.row], torch.arange(6).view(3, 2))


def test_many_tokens_do_not_cost_a_python_loop() -> None:
    def operations(M: int) -> int:
        inputs = MoESpec("many", M=M, D=2, F=2).inputs(torch.float32)
        return ops.profile(lambda: ops.run_with_gradients(grouped_mlp, inputs))[0]

    assert operations(2000) <= operations(50)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(13)}, ShapeError, r"grouped_mlp: x is \[13\], expected \[any, any\] \(M, D\)"),
        ({"w1": torch.zeros(5, 7, 5)}, ShapeError, r"w1 is \[5, 7, 5\], expected \[any, any, 6\] \(E, F, D\)"),
        ({"w3": torch.zeros(5, 8, 6)}, ShapeError, r"w3 is \[5, 8, 6\], expected \[5, 7, 6\]"),
        ({"w2": torch.zeros(5, 7, 6)}, ShapeError, r"w2 is \[5, 7, 6\], expected \[5, 6, 7\] \(E, D, F\)"),
        ({"weights": torch.zeros(12, 2)}, ShapeError, r"weights is \[12, 2\], expected \[13, any\] \(M, k\)"),
        ({"experts": torch.zeros(13, 3).long()}, ShapeError, r"experts is \[13, 3\], expected \[13, 2\]"),
        ({"experts": torch.zeros(13, 2)}, DtypeError, "experts is torch.float32, expected int64 or int32"),
        ({"w2": torch.zeros(5, 6, 7).double()}, DtypeError, "w2 is torch.float64 but x is torch.float32"),
        ({"weights": torch.zeros(13, 2).long()}, DtypeError, "weights is torch.int64, expected float32"),
        ({"experts": torch.zeros(13, 2, device="meta").long()}, DeviceError, "experts is on meta but x is on cpu"),
        ({"backend": "nonesuch"}, BackendError, "unknown backend 'nonesuch'"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        grouped_mlp(**{**BY_NAME["prime"].inputs(torch.float32), **change})


@pytest.mark.parametrize("wrong", [-1, 5])
@EACH_BACKEND
def test_an_expert_that_does_not_exist_is_named(backend: str, wrong: int) -> None:
    inputs = BY_NAME["prime"].inputs(torch.float32)
    inputs["experts"][3, 1] = wrong
    with pytest.raises(
        ShapeError, match=f"grouped_mlp: experts holds {wrong}, expected the index of an expert, 0 to 4"
    ):
        grouped_mlp(**inputs, backend=backend)
