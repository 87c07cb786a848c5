"""The Triton kernels of the gated activation: interpreted on the CPU, compiled on a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_linear.ops import swiglu
from kimi_linear.ops.swiglu.specs import SPECS, SwiGLUSpec
from kimi_linear.ops.swiglu.triton import backend
from support import ops

pytestmark = [
    ops.TRITON,
    # The interpreter computes with numpy, which warns where a sigmoid's exponential is infinite, as it should be.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]
F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SMALL = [spec for spec in SPECS if spec.name != "pieces"]


def call(**arguments: Any) -> Tensor:
    return swiglu(**arguments, backend="triton")


@pytest.mark.parametrize(
    "spec",
    [*SMALL, *(SwiGLUSpec(f"size_{n}", (n,)) for n in (1023, 1024, 1025)), SwiGLUSpec("infinite", (64,), scale=200.0)],
    ids=lambda spec: spec.name,
)
@pytest.mark.parametrize("dtype", [F32, BF16, FP16], ids=str)
def test_results_and_every_gradient_match_the_float64_reference(dtype: torch.dtype, spec: SwiGLUSpec) -> None:
    ops.assert_matches_reference(swiglu, spec.inputs(dtype, ops.DEVICE), "triton", dtype)


def test_it_rounds_once_at_the_end() -> None:
    inputs = SwiGLUSpec("many", (64, 33)).inputs(BF16, ops.DEVICE)
    exact = swiglu(**ops.in_float64(inputs), backend="reference").bfloat16()
    assert (call(**inputs) != exact).float().mean() < 0.01


def test_inputs_strides_and_repeated_runs() -> None:
    inputs = SwiGLUSpec("prime", (7, 13)).inputs(F32, ops.DEVICE)
    ops.assert_inputs_unchanged(call, inputs)
    ops.assert_strides_do_not_matter(call, inputs, F32)
    ops.assert_runs_are_identical(call, inputs)


def test_the_operators_pass_opcheck_and_compile_whole() -> None:
    inputs = SwiGLUSpec("prime", (7, 13)).inputs(F32, ops.DEVICE)
    kinds = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(backend.swiglu_triton, ops.requiring_grad(*inputs.values()), test_utils=kinds)
    args = (torch.randn_like(inputs["up"]), *inputs.values())
    torch.library.opcheck(backend.swiglu_triton_backward, args, test_utils=kinds)
    ops.assert_compiles_whole(call, inputs)


def test_the_kernels_run_only_when_asked_for_by_name() -> None:
    inputs = SwiGLUSpec("prime", (7, 13)).inputs(F32, ops.DEVICE)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        swiglu(**inputs)
        call(**inputs)
    ran = [event.key for event in profile.events() if event.key.startswith("kimi_linear::swiglu")]
    assert [key == "kimi_linear::swiglu_triton" for key in ran] == [False, True]
