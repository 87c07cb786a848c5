import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kimi_linear.base.errors import ConfigError, DtypeError, ShapeError
from kimi_linear.base.numerics import relative_error, tolerance
from kimi_linear.ops.cross_entropy import chunk, cpu, linear_cross_entropy, reference
from kimi_linear.ops.cross_entropy.specs import IGNORED, SPECS, CrossEntropySpec
from support import ops

CASES = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
EACH_BACKEND = pytest.mark.parametrize("backend", ops.backends("linear_cross_entropy"))
EACH_FLOAT64 = pytest.mark.parametrize("backend", ops.backends("linear_cross_entropy", torch.float64))
EACH_DTYPE = pytest.mark.parametrize(("backend", "dtype"), ops.backend_dtypes("linear_cross_entropy"))
# The widest dtype that a backend runs.
WIDEST = {
    backend: dtype
    for dtype in (torch.float32, torch.float64)
    for backend in ops.backends("linear_cross_entropy", dtype)
}
BY_NAME = {spec.name: spec for spec in SPECS}
SOME = pytest.mark.parametrize("name", ["mean", "sum", "none", "ignored", "ignored_none"])


@CASES
@EACH_DTYPE
def test_backend_matches_the_float64_reference(backend: str, dtype: torch.dtype, spec: CrossEntropySpec) -> None:
    ops.assert_matches_reference(linear_cross_entropy, spec.inputs(dtype), backend, dtype)


@pytest.mark.parametrize("spec", [s for s in SPECS if not s.name.startswith(("ignored_all", "no_row"))], ids=str)
def test_reference_is_torchs_cross_entropy_of_the_logits(spec: CrossEntropySpec) -> None:
    def torchs(hidden: Any, weight: Any, labels: Any, ignore_index: int, chunk: Any, reduction: str) -> Any:
        return F.cross_entropy(hidden @ weight.t(), labels, ignore_index=ignore_index, reduction=reduction)

    inputs = spec.inputs(torch.float64)
    outputs, grads = ops.run_with_gradients(lambda **a: linear_cross_entropy(**a, backend="reference"), inputs)
    expected, expected_grads = ops.run_with_gradients(torchs, inputs)
    ops.assert_close(outputs[0], expected[0])
    for name, grad in grads.items():
        ops.assert_close(grad, expected_grads[name])


@SOME
@EACH_FLOAT64
def test_gradients_match_finite_differences(backend: str, name: str) -> None:
    assert ops.gradcheck(lambda **a: linear_cross_entropy(**a, backend=backend), BY_NAME[name].inputs(torch.float64))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@EACH_BACKEND
def test_a_batch_of_ignored_rows_has_loss_zero_and_zero_gradients(backend: str, reduction: str) -> None:
    spec = CrossEntropySpec("all", reduction=reduction, ignored=tuple(range(13)))
    outputs, grads = ops.run_with_gradients(
        lambda **a: linear_cross_entropy(**a, backend=backend), spec.inputs(torch.float32)
    )
    for tensor in (*outputs, *grads.values()):
        assert torch.equal(tensor, torch.zeros_like(tensor))


@EACH_BACKEND
@pytest.mark.parametrize("name", ["ignored", "ignored_none"])
def test_ignored_rows_may_hold_anything(name: str, backend: str) -> None:
    inputs = BY_NAME[name].inputs(torch.float32)
    plain = ops.run_with_gradients(lambda **a: linear_cross_entropy(**a, backend=backend), inputs)
    other = inputs["hidden"].clone()
    other[list(BY_NAME[name].ignored)] = torch.nan
    changed = ops.run_with_gradients(
        lambda **a: linear_cross_entropy(**a, backend=backend), {**inputs, "hidden": other}
    )
    ops.assert_equal(changed, plain)


@EACH_BACKEND
def test_a_row_loss_far_from_its_label_is_exact(backend: str) -> None:
    hidden, weight = torch.tensor([[1.0], [1.0]]), torch.tensor([[200.0], [-300.0], [0.0]])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1, 0]), reduction="none", backend=backend)
    assert loss.tolist() == [500.0, 0.0]


@EACH_BACKEND
def test_rows_are_weighted_by_their_own_gradients(backend: str) -> None:
    inputs = BY_NAME["none"].inputs(WIDEST[backend])
    grads = [torch.zeros(13, dtype=WIDEST[backend])]
    grads[0][5] = 3.0
    found = ops.run_with_gradients(lambda **a: linear_cross_entropy(**a, backend=backend), inputs, grads)[1]
    alone = {**inputs, "hidden": inputs["hidden"][5:6], "labels": inputs["labels"][5:6], "reduction": "sum"}
    expected = ops.run_with_gradients(linear_cross_entropy, alone, [torch.tensor(3.0)])[1]
    ops.assert_close(found["hidden"][5:6], expected["hidden"])
    ops.assert_close(found["weight"], expected["weight"])
    assert found["hidden"][:5].abs().max() == 0


@EACH_BACKEND
@pytest.mark.parametrize("name", ["mean", "none"])
def test_backward_can_run_twice(name: str, backend: str) -> None:
    inputs = BY_NAME[name].inputs(torch.float32)
    hidden = inputs["hidden"].requires_grad_()
    loss = linear_cross_entropy(**inputs, backend=backend).sum()
    one, other = (torch.autograd.grad(2 * loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
@SOME
@EACH_BACKEND
def test_a_gradient_of_one_input_alone_equals_that_of_all(backend: str, name: str, wanted: str) -> None:
    inputs = BY_NAME[name].inputs(torch.float32)
    every = ops.run_with_gradients(lambda **a: linear_cross_entropy(**a, backend=backend), inputs)[1]
    one = ops.run_with_gradients(lambda **a: linear_cross_entropy(**a, backend=backend), inputs, wanted=[wanted])[1]
    assert list(one) == [wanted]
    assert torch.equal(one[wanted], every[wanted])


@EACH_BACKEND
def test_int32_labels_and_mixed_dtypes(backend: str) -> None:
    inputs = BY_NAME["ignored"].inputs(torch.bfloat16)
    inputs["weight"] = inputs["weight"].float()
    ops.assert_matches_reference(linear_cross_entropy, inputs, backend, torch.bfloat16)
    narrow = {**inputs, "labels": inputs["labels"].int()}
    assert torch.equal(linear_cross_entropy(**narrow, backend=backend), linear_cross_entropy(**inputs, backend=backend))


@SOME
@EACH_BACKEND
def test_autocast_rounds_hidden_alone(backend: str, name: str) -> None:
    inputs = BY_NAME[name].inputs(torch.float32)
    rounded = {**inputs, "hidden": inputs["hidden"].bfloat16()}
    expected, expected_grads = ops.run_with_gradients(lambda **a: linear_cross_entropy(**a, backend=backend), rounded)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, grads = ops.run_with_gradients(lambda **a: linear_cross_entropy(**a, backend=backend), inputs)
    assert torch.equal(outputs[0], expected[0])
    assert torch.equal(grads["weight"], expected_grads["weight"])
    assert relative_error(grads["hidden"], expected_grads["hidden"]) <= tolerance(torch.bfloat16).gradient


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_chunk_backend_never_holds_the_logits_of_two_chunks(reduction: str) -> None:
    inputs = CrossEntropySpec("peak", M=512, D=4, V=1024, chunk=32, reduction=reduction).inputs(torch.float32)
    run = functools.partial(linear_cross_entropy, backend="chunk")
    _, largest = ops.profile(lambda: ops.run_with_gradients(run, inputs))
    assert largest == 32 * 1024 * 4


@SOME
@EACH_BACKEND
def test_inputs_strides_and_repeated_runs(backend: str, name: str) -> None:
    def call(**arguments: Any) -> Any:
        return linear_cross_entropy(**arguments, backend=backend)

    inputs = BY_NAME[name].inputs(WIDEST[backend])
    ops.assert_inputs_unchanged(call, inputs)
    ops.assert_strides_do_not_matter(call, inputs, WIDEST[backend])
    ops.assert_runs_are_identical(call, inputs)


@SOME
@EACH_BACKEND
def test_the_call_compiles_whole(backend: str, name: str) -> None:
    ops.assert_compiles_whole(
        lambda **a: linear_cross_entropy(**a, backend=backend), BY_NAME[name].inputs(torch.float32)
    )


def test_custom_ops_pass_opcheck() -> None:
    inputs = BY_NAME["ignored"].inputs(torch.float32)
    args = (inputs["hidden"], inputs["weight"], inputs["labels"], IGNORED)
    rows = torch.randn(args[0].shape[0])
    ops.opcheck(reference.linear_cross_entropy_reference, *ops.requiring_grad(*args))
    ops.opcheck(reference.linear_cross_entropy_reference_backward, rows, *args)


@pytest.mark.parametrize(
    ("rows_op", "backward", "online"),
    [
        pytest.param(
            getattr(module, f"linear_cross_entropy_{name}"),
            getattr(module, f"linear_cross_entropy_{name}_backward"),
            getattr(module, f"linear_cross_entropy_{name}_online"),
            id=name,
            marks=marks,
        )
        for name, module, marks in (("chunk", chunk, ()), ("cpu", cpu, ops.NATIVE))
    ],
)
def test_custom_ops_with_gradients_in_the_forward_pass_opcheck(rows_op: Any, backward: Any, online: Any) -> None:
    inputs = BY_NAME["ignored"].inputs(torch.float32)
    args = (inputs["hidden"], inputs["weight"], inputs["labels"], IGNORED)
    rows = torch.randn(args[0].shape[0])
    ops.opcheck(rows_op, *ops.requiring_grad(*args, 4))
    ops.opcheck(backward, rows, *args, 4)
    ops.opcheck(online, *ops.requiring_grad(*args, 4, True))
    hidden, weight, labels, ignore_index = args
    ops.opcheck(online, hidden.requires_grad_(), weight, labels, ignore_index, 4, False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(1, 13, 12)}, ShapeError, r"hidden is \[1, 13, 12\], expected \[any, any\] \(M, D\)"),
        ({"weight": torch.zeros(37, 11)}, ShapeError, r"weight is \[37, 11\], expected \[any, 12\] \(V, D\)"),
        ({"labels": torch.zeros(12, dtype=torch.int64)}, ShapeError, r"labels is \[12\], expected \[13\] \(M\)"),
        ({"labels": torch.zeros(13)}, DtypeError, "labels is torch.float32, expected int64 or int32"),
        ({"reduction": "max"}, ConfigError, "reduction is 'max', expected 'mean', 'sum' or 'none'"),
        ({"chunk": 0}, ConfigError, "chunk is 0, expected a number of rows, at least 1"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{**BY_NAME["mean"].inputs(torch.float32), **change})


@pytest.mark.parametrize("label", [37, -1])
@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@EACH_BACKEND
def test_a_label_outside_the_vocabulary_is_named(backend: str, reduction: str, needs_grad: bool, label: int) -> None:
    inputs = BY_NAME["ignored"].inputs(torch.float32)
    inputs["labels"][6] = label
    inputs["weight"].requires_grad_(needs_grad)
    with pytest.raises(ShapeError, match=rf"labels holds {label} at row 6, expected 0 to 36 .* ignore_index = -100"):
        linear_cross_entropy(**{**inputs, "reduction": reduction}, backend=backend)
