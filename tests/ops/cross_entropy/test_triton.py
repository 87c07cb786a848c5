"""The Triton kernel of linear cross entropy, interpreted where there is no GPU: the contract, and what is its own."""

import functools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kimi_linear.base.errors import BackendError, ShapeError
from kimi_linear.base.numerics import relative_error, tolerance
from kimi_linear.ops.cross_entropy import linear_cross_entropy
from kimi_linear.ops.cross_entropy.api import LINEAR_CROSS_ENTROPY
from kimi_linear.ops.cross_entropy.specs import IGNORED, SPECS, CrossEntropySpec
from kimi_linear.ops.cross_entropy.triton import backend
from kimi_linear.ops.registry import Call
from support import ops
from support.source_tree import ROOT

pytestmark = [
    ops.TRITON,
    # The interpreter takes a loop's bound for a scalar, which numpy 2.3 warns of and 2.4 refuses.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]
ON_CPU = pytest.mark.skipif(ops.DEVICE != "cpu", reason="labels are looked at on the CPU alone")
F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
BY_NAME = {spec.name: spec for spec in SPECS}
# One word less than a block, a block, one more, and a prime.
BLOCKS = [
    *(CrossEntropySpec(f"V{V}", M=3, D=5, V=V, chunk=2, reduction="none") for V in (4095, 4096, 4097, 8209)),
    CrossEntropySpec("V8209_mean", M=3, D=5, V=8209, chunk=2, ignored=(1,), spread=30.0),
]
HALF = ("mean", "ignored_none", "many_words")
CASES = [
    *((spec, F32) for spec in (*SPECS, *BLOCKS)),
    *((BY_NAME[name], dtype) for name in HALF for dtype in (BF16, FP16)),
    *((spec, BF16) for spec in BLOCKS[:2]),
]
SOME = pytest.mark.parametrize("name", ["mean", "none", "ignored", "ignored_none"])
EACH_DTYPE = pytest.mark.parametrize("dtype", [F32, BF16, FP16], ids=str)

run = functools.partial(linear_cross_entropy, backend="triton")


def inputs_of(spec: CrossEntropySpec, dtype: torch.dtype = F32) -> dict[str, Any]:
    return spec.inputs(dtype, ops.DEVICE)


def consume(logits: Tensor, labels: list[int], factors: Tensor | None = None, grad: bool = True) -> Tensor:
    """Run the kernel in place; return the losses."""
    losses = torch.full((len(labels),), torch.nan, device=logits.device)
    backend.consume(logits, torch.tensor(labels, device=logits.device), IGNORED, factors, losses, grad)
    return losses


def draw_logits(c: int, V: int, dtype: torch.dtype = F32, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return (torch.randn(c, V, generator=generator) * spread).to(ops.DEVICE, dtype)


@pytest.mark.parametrize(("spec", "dtype"), CASES, ids=[f"{s.name}-{str(d)[6:]}" for s, d in CASES])
def test_losses_and_every_gradient_match_the_float64_reference(spec: CrossEntropySpec, dtype: torch.dtype) -> None:
    ops.assert_matches_reference(linear_cross_entropy, inputs_of(spec, dtype), "triton", dtype)


@EACH_DTYPE
def test_a_loss_without_gradients_is_that_with_gradients(dtype: torch.dtype) -> None:
    for name in ("ignored", "ignored_none"):
        inputs = inputs_of(BY_NAME[name], dtype)
        with_gradients = ops.run_with_gradients(run, inputs)[0][0]
        assert torch.equal(run(**inputs), with_gradients)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_batch_of_ignored_rows_has_loss_zero_and_zero_gradients(reduction: str) -> None:
    spec = CrossEntropySpec("all", reduction=reduction, ignored=tuple(range(13)))
    outputs, grads = ops.run_with_gradients(run, inputs_of(spec))
    for tensor in (*outputs, *grads.values()):
        assert torch.equal(tensor, torch.zeros_like(tensor))


@EACH_DTYPE
@pytest.mark.parametrize("name", ["ignored", "ignored_none"])
def test_ignored_rows_may_hold_anything(name: str, dtype: torch.dtype) -> None:
    inputs = inputs_of(BY_NAME[name], dtype)
    plain = ops.run_with_gradients(run, inputs)
    other = inputs["hidden"].clone()
    other[list(BY_NAME[name].ignored)] = torch.nan
    ops.assert_equal(ops.run_with_gradients(run, {**inputs, "hidden": other}), plain)
    rows = list(BY_NAME[name].ignored)
    assert torch.equal(plain[1]["hidden"][rows], torch.zeros_like(plain[1]["hidden"][rows]))


def test_the_kernel_does_not_read_an_ignored_row() -> None:
    logits = draw_logits(2, 37)
    logits[0] = torch.nan
    losses = consume(logits, [IGNORED, 3])
    assert losses[0] == 0
    assert torch.equal(logits[0], torch.zeros_like(logits[0]))
    assert losses.isfinite().all()
    assert logits.isfinite().all()


def test_an_ignored_label_inside_the_vocabulary_is_ignored() -> None:
    inputs = inputs_of(CrossEntropySpec("x", M=5)) | {"ignore_index": 1}
    inputs["labels"] = torch.tensor([1, 0, 1, 2, 1], device=ops.DEVICE)
    ops.assert_matches_reference(linear_cross_entropy, inputs, "triton", F32)


def test_a_row_loss_far_from_its_label_is_exact() -> None:
    hidden, weight = torch.tensor([[1.0], [1.0]]), torch.tensor([[200.0], [-300.0], [0.0]])
    x = [t.to(ops.DEVICE) for t in (hidden, weight, torch.tensor([1, 0]))]
    assert run(*x, reduction="none").tolist() == [500.0, 0.0]


def test_logits_beyond_the_range_of_exp_lose_nothing() -> None:
    labels = [0, 1, 4097, 4099]
    for shift in (-1000.0, 1000.0):
        logits = draw_logits(4, 4100, spread=1.0) + shift
        expected = torch.nn.functional.cross_entropy(
            logits.double(), torch.tensor(labels, device=ops.DEVICE), reduction="none"
        )
        assert relative_error(consume(logits, labels), expected) <= tolerance(F32).output


# The interpreter computes with numpy, which warns.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_one_infinite_logit_makes_its_row_nan_and_no_other() -> None:
    logits = draw_logits(3, 37)
    logits[1, 5] = torch.inf
    losses = consume(logits, [0, 1, 2])
    assert losses.isnan().tolist() == [False, True, False]
    assert logits.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("label", [37, -1, 2**40])
def test_a_label_outside_the_vocabulary_makes_nans_where_nobody_looks(label: int) -> None:
    logits, plain = draw_logits(3, 37), draw_logits(3, 37)
    losses, expected = consume(logits, [0, label, 2]), consume(plain, [0, 1, 2])
    assert losses[1].isnan()
    assert logits[1].isnan().all()
    for row in (0, 2):
        assert torch.equal(losses[row], expected[row])
        assert torch.equal(logits[row], plain[row])


@ON_CPU
@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_label_outside_the_vocabulary_is_named_on_the_cpu(reduction: str, needs_grad: bool) -> None:
    inputs = inputs_of(BY_NAME["ignored"])
    inputs["labels"][6] = 37
    inputs["weight"].requires_grad_(needs_grad)
    with pytest.raises(ShapeError, match=r"labels holds 37 at row 6, expected 0 to 36 .* ignore_index = -100"):
        run(**{**inputs, "reduction": reduction})


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_row_has_the_same_bits_alone_and_in_a_chunk(dtype: torch.dtype) -> None:
    labels, factors = [5, 4098, IGNORED, 0, 17], torch.tensor([1.0, -2.0, 3.0, 0.5, 0.0], device=ops.DEVICE)
    logits = draw_logits(5, 4099, dtype)
    rows = [logits[row : row + 1].clone() for row in range(5)]
    losses = consume(logits, labels, factors)
    for row, alone in enumerate(rows):
        assert torch.equal(consume(alone, labels[row : row + 1], factors[row : row + 1]), losses[row : row + 1])
        assert torch.equal(alone, logits[row : row + 1])


def test_the_kernel_writes_nothing_but_its_rows() -> None:
    """Neither beside them, nor, without gradients, at all."""
    around = torch.full((4, 4099), 7.0, device=ops.DEVICE)
    around[1:3] = draw_logits(2, 4099)
    before = around.clone()
    consume(around[1:3], [1, 2], grad=False)
    assert torch.equal(around, before)
    consume(around[1:3], [1, 2])
    assert torch.equal(around[[0, 3]], before[[0, 3]])


def test_gradients_of_the_logits_sum_to_zero() -> None:
    logits = draw_logits(4, 4099)
    consume(logits, [0, 4095, 4096, 4098])
    assert logits.double().sum(1).abs().max() <= 1e-5


def test_rows_are_weighted_by_their_own_gradients() -> None:
    inputs = inputs_of(BY_NAME["none"])
    grads = [torch.zeros(13, device=ops.DEVICE)]
    grads[0][5] = 3.0
    found = ops.run_with_gradients(run, inputs, grads)[1]
    alone = {**inputs, "hidden": inputs["hidden"][5:6], "labels": inputs["labels"][5:6], "reduction": "sum"}
    expected = ops.run_with_gradients(run, alone, [torch.tensor(3.0, device=ops.DEVICE)])[1]
    ops.assert_close(found["hidden"][5:6], expected["hidden"])
    ops.assert_close(found["weight"], expected["weight"])
    assert found["hidden"][:5].abs().max() == 0


@SOME
def test_backward_can_run_twice(name: str) -> None:
    inputs = inputs_of(BY_NAME[name])
    hidden = inputs["hidden"].requires_grad_()
    loss = run(**inputs).sum()
    one, other = (torch.autograd.grad(2 * loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
@pytest.mark.parametrize("name", ["mean", "ignored_none"])
def test_a_gradient_of_one_input_alone_equals_that_of_all(name: str, wanted: str) -> None:
    inputs = inputs_of(BY_NAME[name])
    every = ops.run_with_gradients(run, inputs)[1]
    one = ops.run_with_gradients(run, inputs, wanted=[wanted])[1]
    assert list(one) == [wanted]
    assert torch.equal(one[wanted], every[wanted])


def test_int32_labels_and_mixed_dtypes() -> None:
    inputs = inputs_of(BY_NAME["ignored"], BF16)
    inputs["weight"] = inputs["weight"].float()
    ops.assert_matches_reference(linear_cross_entropy, inputs, "triton", BF16)
    assert torch.equal(run(**{**inputs, "labels": inputs["labels"].int()}), run(**inputs))


@pytest.mark.parametrize("name", ["mean", "ignored_none"])
def test_autocast_rounds_hidden_alone(name: str) -> None:
    inputs = inputs_of(BY_NAME[name])
    expected, expected_grads = ops.run_with_gradients(run, {**inputs, "hidden": inputs["hidden"].bfloat16()})
    with torch.autocast(ops.DEVICE, dtype=BF16):
        outputs, grads = ops.run_with_gradients(run, inputs)
    assert torch.equal(outputs[0], expected[0])
    assert torch.equal(grads["weight"], expected_grads["weight"])
    assert relative_error(grads["hidden"], expected_grads["hidden"]) <= tolerance(BF16).gradient


@pytest.mark.parametrize("name", ["mean", "ignored_none"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_inputs_strides_and_repeated_runs(name: str, dtype: torch.dtype) -> None:
    inputs = inputs_of(BY_NAME[name], dtype)
    ops.assert_inputs_unchanged(run, inputs)
    ops.assert_strides_do_not_matter(run, inputs, dtype)
    ops.assert_runs_are_identical(run, inputs)


@pytest.mark.parametrize("name", ["ignored", "ignored_none"])
def test_the_call_compiles_whole(name: str) -> None:
    ops.assert_compiles_whole(run, inputs_of(BY_NAME[name]))


def test_custom_ops_pass_opcheck() -> None:
    inputs = inputs_of(BY_NAME["ignored"])
    args = (inputs["hidden"], inputs["weight"], inputs["labels"], IGNORED, 4)
    rows = torch.randn(13, device=ops.DEVICE)
    # All of torch's checks but the one that compiles, which is made above.
    kinds = ("test_schema", "test_autograd_registration", "test_faketensor")
    check = functools.partial(torch.library.opcheck, test_utils=kinds)
    check(backend.linear_cross_entropy_triton, ops.requiring_grad(*args))
    check(backend.linear_cross_entropy_triton_backward, (rows, *args))
    check(backend.linear_cross_entropy_triton_online, ops.requiring_grad(*args, True))
    hidden, *others = args
    check(backend.linear_cross_entropy_triton_online, (hidden.requires_grad_(), *others, False))


class Storages(TorchDispatchMode):
    """Collects the memory of every result that has so many elements."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.found = elements, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() == self.elements:
            self.found.add(result.untyped_storage().data_ptr())
        return result


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_logits_of_a_chunk_are_held_once(reduction: str) -> None:
    inputs = inputs_of(CrossEntropySpec("peak", M=33, D=4, V=64, chunk=7))
    grad_rows = torch.ones(33, device=ops.DEVICE) if reduction == "none" else None
    with Storages(7 * 64) as storages:
        backend._gradients(*(inputs[name] for name in ("hidden", "weight", "labels")), IGNORED, 7, grad_rows, True)
    assert len(storages.found) == 1


def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor without memory has no value the host could read."""
    from kimi_linear.ops.triton import launch

    launched = []
    monkeypatch.setattr(launch, "start", lambda kernel, programs, *_, **__: launched.append(programs))
    # Only labels on the CPU are looked at, which these stand for labels on a GPU are not.
    monkeypatch.setattr(backend, "counted_rows", lambda *_: None)
    spec = CrossEntropySpec("x", ignored=(0, 3))
    hidden, weight, labels = (spec.inputs(BF16)[name].to("meta") for name in ("hidden", "weight", "labels"))
    backend._gradients(hidden, weight, labels, IGNORED, 4, None, True)
    assert launched == [4, 4, 4, 1]


@pytest.mark.parametrize(
    ("V", "element_size", "rows"), [(163_840, 2, 384), (163_840, 4, 128), (32_000, 2, 2048), (10**7, 4, 128)]
)
def test_default_chunks_hold_128_mebibytes_in_multiples_of_128_rows(V: int, element_size: int, rows: int) -> None:
    assert backend.default_rows(V, element_size) == rows
    assert rows == 128 or rows * V * element_size <= 128 * 2**20 < (rows + 128) * V * element_size


def test_it_runs_on_a_gpu_when_asked_for_by_name() -> None:
    call = Call("cuda", "bfloat16", needs_grad=True)
    assert LINEAR_CROSS_ENTROPY.choose(call).name == "chunk"
    assert LINEAR_CROSS_ENTROPY.choose(call, "triton").name == "triton"
    with pytest.raises(BackendError, match="float64 is not one of float32, bfloat16, float16"):
        run(**inputs_of(BY_NAME["mean"], torch.float64))


COMPILE = """
import compile_gpu
for name, call in compile_gpu.calls():
    if name == "cross_entropy V=163840 bfloat16 none":
        for kernel, args, options in compile_gpu.launches(call):
            print(kernel.__name__, compile_gpu.compile_launch(kernel, args, options)["spilled"])
"""


def test_the_kernel_compiles_for_a_gpu_without_a_spill() -> None:
    """In a process of its own, for here kernels are interpreted. scripts/compile_gpu.py compiles all of them."""
    pytest.importorskip("triton.backends.nvidia", reason="this triton has no compiler for NVIDIA's GPUs")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'scripts'}"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["row_kernel 0"]
