"""The experts through torch's grouped matrix product, which torch runs on the CPU too, by a loop of its own."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kimi_linear.base.errors import BackendError
from kimi_linear.ops import grouped_mlp
from kimi_linear.ops.moe import grouped, grouped_mm, router
from kimi_linear.ops.moe.api import GROUPED_MLP
from kimi_linear.ops.moe.runs import sort_by_expert
from kimi_linear.ops.moe.specs import SPECS, MoESpec
from kimi_linear.ops.registry import Call
from support import moe, ops

ON_GPU = ops.DEVICE == "cuda"
DTYPES = [torch.bfloat16] if ON_GPU else [torch.float32, torch.bfloat16, torch.float16]
# Rows of 16 bytes, and enough of them that an error in half precision says something.
ALIGNED = [dataclasses.replace(spec, D=32, F=24) for spec in SPECS]
BY_NAME = {spec.name: spec for spec in ALIGNED}
SIZES = {"M": 13, "D": 32, "E": 5, "F": 24, "k": 2}


@pytest.mark.parametrize("spec", ALIGNED, ids=lambda spec: spec.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_and_every_gradient_match_the_float64_reference(dtype: torch.dtype, spec: MoESpec) -> None:
    ops.assert_matches_reference(grouped_mlp, moe.draw(spec, dtype), "grouped_mm", dtype)


@pytest.mark.parametrize("check", moe.CONTRACT, ids=lambda check: check.__name__)
def test_the_contract_of_the_experts_holds(check: Any) -> None:
    check("grouped_mm", BY_NAME["unused_experts"], DTYPES[0])


@pytest.mark.skipif(ON_GPU, reason="there the experts are looked at only in debug mode")
def test_an_expert_that_does_not_exist_is_named() -> None:
    moe.an_expert_that_does_not_exist_is_named("grouped_mm", BY_NAME["prime"], DTYPES[0])


def test_tensors_may_start_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU torch takes only what starts at a multiple of 16 bytes; its loop on the CPU takes anything."""
    inputs = moe.draw(BY_NAME["prime"], DTYPES[0])
    expected = ops.run_with_gradients(moe.call("grouped_mm"), inputs)
    shifted = {}
    for name, x in inputs.items():
        memory = x.new_zeros(x.numel() + 1)
        shifted[name] = memory[1:].view(x.shape).copy_(x)
    assert shifted["w1"].data_ptr() % 16 != 0
    product, starts = F.grouped_mm, []

    def spy(*operands: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        starts.extend(x.data_ptr() % 16 for x in operands)
        return product(*operands, offs=offs)

    monkeypatch.setattr(F, "grouped_mm", spy)
    ops.assert_equal(ops.run_with_gradients(moe.call("grouped_mm"), shifted), expected)
    assert starts == [0] * 18


def opcheck(keep: bool, spec: MoESpec) -> None:
    args = tuple(moe.draw(spec, DTYPES[0]).values())
    ops.opcheck(grouped_mm.grouped_mlp_grouped_mm, *(ops.requiring_grad(*args) if keep else args), keep)
    if keep:
        _, h1, h3 = grouped_mm.grouped_mlp_grouped_mm(*args, keep)
        ops.opcheck(grouped_mm.grouped_mlp_grouped_mm_backward, torch.randn_like(args[0]), *args, h1, h3)


@pytest.mark.parametrize("name", ["unused_experts", "no_token"])
@pytest.mark.parametrize("keep", [True, False])
def test_custom_ops_pass_opcheck(keep: bool, name: str) -> None:
    opcheck(keep, BY_NAME[name])


def test_the_host_reads_no_value() -> None:
    """Torch's shape functions hold the layouts to what its kernel for a GPU takes, too."""
    ops_of = grouped_mm.grouped_mlp_grouped_mm, grouped_mm.grouped_mlp_grouped_mm_backward
    assert moe.on_meta(*ops_of, torch.bfloat16)[1:4] == ((64, 128, 256), (64, 128, 256), (64, 256, 128))
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        moe.on_meta(grouped.grouped_mlp_grouped, grouped.grouped_mlp_grouped_backward, torch.bfloat16)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_the_host_reads_no_value_to_route(activation: str) -> None:
    logits, bias = torch.randn(64, 16, device="meta"), torch.randn(16, device="meta")
    weights, experts = router.moe_route_reference._init_fn(logits, bias, 4, True, 2.0, activation)
    d_logits = router.moe_route_reference_backward._init_fn(weights, logits, experts, True, 2.0, activation)
    assert (weights.shape, experts.shape, d_logits.shape) == ((64, 4), (64, 4), (64, 16))


def test_gradients_of_matrices_ask_for_the_layout_that_takes_empty_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With both sides jagged, torch's kernel for a GPU takes an empty run only of rows that lie one after the other."""
    product, jagged = F.grouped_mm, []

    def spy(a: torch.Tensor, b: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        if a.dim() == b.dim() == 2:
            jagged.append((a.stride(0), b.stride(1)))
        return product(a, b, offs=offs)

    monkeypatch.setattr(F, "grouped_mm", spy)
    ops.run_with_gradients(moe.call("grouped_mm"), moe.draw(BY_NAME["unused_experts"], DTYPES[0]))
    assert jagged == [(1, 1)] * 3


def test_runs_end_behind_the_last_row_of_each_expert() -> None:
    experts = torch.tensor([[4, 1], [1, 0], [4, 4]], device=ops.DEVICE)
    runs = sort_by_expert(experts, E=6)
    assert runs.ends.tolist() == [1, 3, 3, 3, 6, 6]
    assert runs.ends.dtype == torch.int32
    assert runs.order.tolist() == [3, 1, 2, 0, 4, 5]
    assert sort_by_expert(experts[:0], E=3).ends.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("device", "dtype", "change", "reason"),
    [
        ("cpu", "float64", {}, "float64 is not one of float32, bfloat16, float16"),
        ("cpu", "bfloat16", {"D": 36}, "D = 36 and F = 24 must be multiples of 8: rows of 16 bytes"),
        ("cpu", "float32", {"F": 26}, "D = 32 and F = 26 must be multiples of 4: rows of 16 bytes"),
        ("mps", "bfloat16", {}, "tensors are on mps, neither on a GPU nor on the CPU"),
        ("cuda", "float16", {}, "torch loops over the experts on a GPU for float16: only bfloat16 has a kernel"),
        ("cuda", "float32", {}, "torch loops over the experts on a GPU for float32: only bfloat16 has a kernel"),
        ("cuda", "bfloat16", {"E": 1024}, "E is above 1023"),
    ],
)
def test_what_torch_does_not_take_is_refused(
    device: str, dtype: str, change: dict[str, int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert grouped_mm.refuse(Call(device, dtype, False, {**SIZES, **change})) == [reason]
    assert grouped_mm.refuse(Call("cuda", "bfloat16", True, SIZES)) == []


@pytest.mark.parametrize(("cuda", "capability"), [(None, (9, 4)), ("13.0", (8, 0)), ("13.0", (12, 0))])
def test_a_gpu_that_torch_has_no_kernel_for_is_refused(cuda, capability, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    found = grouped_mm.refuse(Call("cuda", "bfloat16", True, SIZES))
    assert found == ["torch has the kernel for NVIDIA GPUs of compute capability 9 and 10 alone"]


def test_a_torch_without_the_product_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(F, "grouped_mm")
    with pytest.raises(BackendError, match=r"this torch has no grouped_mm, which came with 2\.10"):
        grouped_mlp(**moe.draw(BY_NAME["prime"], DTYPES[0]), backend="grouped_mm")


def test_it_runs_only_when_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    chosen = GROUPED_MLP.choose(Call("cuda", "bfloat16", True, SIZES))
    assert chosen.name == "grouped"
    assert GROUPED_MLP.choose(Call("cuda", "bfloat16", True, SIZES), "grouped_mm").name == "grouped_mm"
