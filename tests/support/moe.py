"""What holds for every backend of the experts that sorts on the device, each check by the backend's name and a case."""

from typing import Any

import pytest
import torch

from kimi_linear.base.errors import ShapeError
from kimi_linear.ops import grouped_mlp
from kimi_linear.ops.moe.specs import MoESpec
from support import ops


def call(backend: str) -> Any:
    """Return `grouped_mlp` by that backend."""
    return lambda **arguments: grouped_mlp(**arguments, backend=backend)


def draw(spec: MoESpec, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of a case where Triton's tests put their tensors."""
    return spec.inputs(dtype, ops.DEVICE)


def experts_without_tokens_get_gradients_of_exactly_zero(backend: str, spec: MoESpec, dtype: torch.dtype) -> None:
    with ops.nan_in_new_memory():
        _, grads = ops.run_with_gradients(call(backend), draw(spec, dtype))
    for name in ("w1", "w3", "w2"):
        assert torch.equal(grads[name][[0, 3]], torch.zeros_like(grads[name][[0, 3]]))
        assert all(grads[name][e].abs().max() > 0 for e in (1, 2, 4))


def an_expert_without_tokens_is_not_read(backend: str, spec: MoESpec, dtype: torch.dtype) -> None:
    inputs = draw(spec, dtype)
    plain = ops.run_with_gradients(call(backend), inputs)
    for name in ("w1", "w3", "w2"):
        inputs[name][[0, 3]] = torch.nan
    ops.assert_equal(ops.run_with_gradients(call(backend), inputs), plain)


def a_token_does_not_depend_on_its_neighbours(backend: str, spec: MoESpec, dtype: torch.dtype) -> None:
    inputs = draw(spec, dtype)
    o = call(backend)(**inputs)
    inputs["x"][5] = torch.nan
    other = call(backend)(**inputs)
    assert other[5].isnan().all()
    assert torch.equal(other[:5], o[:5])
    assert torch.equal(other[6:], o[6:])


def an_expert_named_twice_counts_twice(backend: str, spec: MoESpec, dtype: torch.dtype) -> None:
    inputs = draw(spec, dtype)
    inputs["experts"][:, 1] = inputs["experts"][:, 0]
    once = {"weights": inputs["weights"].sum(-1, keepdim=True), "experts": inputs["experts"][:, :1]}
    ops.assert_close(call(backend)(**inputs), call(backend)(**{**inputs, **once}))
    ops.assert_matches_reference(grouped_mlp, inputs, backend, dtype)


def a_gradient_of_one_input_alone_equals_that_of_all(backend: str, spec: MoESpec, dtype: torch.dtype) -> None:
    inputs = draw(spec, dtype)
    _, every = ops.run_with_gradients(call(backend), inputs)
    for name in ("x", "w1", "weights"):
        _, one = ops.run_with_gradients(call(backend), inputs, wanted=[name])
        assert torch.equal(one[name], every[name])


def int32_experts_and_weights_in_the_dtype_of_x_are_accepted(backend: str, spec: MoESpec, dtype: torch.dtype) -> None:
    inputs = draw(spec, dtype)
    low = {**inputs, "weights": inputs["weights"].to(dtype), "experts": inputs["experts"].int()}
    ops.assert_matches_reference(grouped_mlp, low, backend, dtype)


def inputs_strides_and_repeated_runs(backend: str, spec: MoESpec, dtype: torch.dtype) -> None:
    inputs = draw(spec, dtype)
    ops.assert_inputs_unchanged(call(backend), inputs)
    ops.assert_strides_do_not_matter(call(backend), inputs, dtype)
    ops.assert_runs_are_identical(call(backend), inputs)


def autocast_is_a_cast_of_tokens_and_experts(backend: str, spec: MoESpec, dtype: torch.dtype) -> None:
    inputs = draw(spec, torch.float32)
    with torch.autocast(ops.DEVICE, dtype=torch.bfloat16):
        (o,), grads = ops.run_with_gradients(call(backend), inputs)
    low = {name: inputs[name].bfloat16() for name in ("x", "w1", "w3", "w2")}
    (expected,), expected_grads = ops.run_with_gradients(call(backend), {**inputs, **low})
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, expected)
    assert all(torch.equal(grad, expected_grads[name].float()) for name, grad in grads.items())


def activations_are_kept_only_for_a_backward(backend: str, spec: MoESpec, dtype: torch.dtype) -> None:
    inputs = draw(spec, dtype)
    shapes: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        call(backend)(**{**inputs, "x": inputs["x"].requires_grad_()})
        assert shapes.count((spec.M * spec.k, spec.F)) == 2
        shapes.clear()
        with torch.no_grad():
            call(backend)(**inputs)
    assert shapes == []


def the_call_compiles_whole(backend: str, spec: MoESpec, dtype: torch.dtype) -> None:
    ops.assert_compiles_whole(call(backend), draw(spec, dtype))


def an_expert_that_does_not_exist_is_named(backend: str, spec: MoESpec, dtype: torch.dtype) -> None:
    for wrong in (-1, spec.E):
        inputs = draw(spec, dtype)
        inputs["experts"][3, 1] = wrong
        with pytest.raises(ShapeError, match=f"grouped_mlp: experts holds {wrong}, expected the index of an expert"):
            call(backend)(**inputs)


# Cases have 13 tokens and 5 experts, of which nobody goes to 0 and 3.
CONTRACT = (
    experts_without_tokens_get_gradients_of_exactly_zero,
    an_expert_without_tokens_is_not_read,
    a_token_does_not_depend_on_its_neighbours,
    an_expert_named_twice_counts_twice,
    a_gradient_of_one_input_alone_equals_that_of_all,
    int32_experts_and_weights_in_the_dtype_of_x_are_accepted,
    inputs_strides_and_repeated_runs,
    autocast_is_a_cast_of_tokens_and_experts,
    activations_are_kept_only_for_a_backward,
    the_call_compiles_whole,
)


def on_meta(forward: Any, backward: Any, dtype: torch.dtype) -> tuple[torch.Size, ...]:
    """Run an operator's own code, forward and backward, on tensors without values; return the shapes of its gradients.

    A read of a value by the host, which would wait for a GPU, has nothing to read here and fails.
    """
    arguments = MoESpec("meta", M=1024, E=64, k=8, D=256, F=128).inputs(dtype).values()
    inputs = [x.to("meta") for x in arguments]
    o, h1, h3 = forward._init_fn(*inputs, True)
    assert o.shape == inputs[0].shape
    assert h1.shape == h3.shape == (8 * 1024, 128)
    forward._init_fn(*inputs, False)
    return tuple(d.shape for d in backward._init_fn(o, *inputs, h1, h3))
