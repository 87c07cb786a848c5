"""The Triton kernels of the norms: interpreted on the CPU, compiled on a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_linear.base.errors import BackendError
from kimi_linear.ops import gated_rms_norm, l2_norm, rms_norm
from kimi_linear.ops.norm.specs import SPECS, NormSpec
from kimi_linear.ops.norm.triton import backend
from support import ops

pytestmark = [
    ops.TRITON,
    # The interpreter takes a loop's bound for a scalar, which numpy 2.3 warns of and 2.4 refuses.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]
F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "rms_norm": rms_norm,
    "gated_rms_norm": gated_rms_norm,
    "l2_norm": l2_norm,
}
EACH = pytest.mark.parametrize("op", FUNCTIONS)
HEADS = next(spec for spec in SPECS if spec.name == "heads_silu")
MANY = next(spec for spec in SPECS if spec.name == "many_rows")


def draw(spec: NormSpec, op: str, dtype: torch.dtype) -> dict[str, Any]:
    inputs: dict[str, Any] = getattr(spec, op)(dtype, ops.DEVICE)
    return inputs


def run(op: str) -> Callable[..., Tensor]:
    return lambda **arguments: FUNCTIONS[op](**arguments, backend="triton")


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("dtype", [F32, BF16, FP16], ids=str)
@EACH
def test_results_and_every_gradient_match_the_float64_reference(op: str, dtype: torch.dtype, spec: NormSpec) -> None:
    ops.assert_matches_reference(FUNCTIONS[op], draw(spec, op, dtype), "triton", dtype)


@pytest.mark.parametrize("spec", [HEADS, NormSpec("heads_of_128", (5, 128)), NormSpec("ragged", (9, 37))])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@EACH
def test_rows_that_do_not_fit_registers(
    op: str, dtype: torch.dtype, spec: NormSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "HELD_CHANNELS", 0)
    monkeypatch.setattr(backend, "WIDE", {"BLOCK": 16, "ROWS": 4, "num_warps": 4})
    ops.assert_matches_reference(FUNCTIONS[op], draw(spec, op, dtype), "triton", dtype)


@pytest.mark.parametrize("size", [8193, 16384])
@EACH
def test_the_widest_rows(op: str, size: int) -> None:
    ops.assert_matches_reference(FUNCTIONS[op], draw(NormSpec("widest", (2, size)), op, F32), "triton", F32)


@EACH
def test_wider_rows_are_refused(op: str) -> None:
    with pytest.raises(BackendError, match="takes rows of 16384 at most, not 16385"):
        run(op)(**draw(NormSpec("wider", (1, 16385)), op, F32))


@pytest.mark.parametrize("run_of_tiles", [2, 3])
@EACH
def test_programs_may_share_the_rows_in_any_way(op: str, run_of_tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "TILE", 64)
    monkeypatch.setattr(backend, "programs", lambda count, D: (-(-count // run_of_tiles), run_of_tiles))
    ops.assert_matches_reference(FUNCTIONS[op], draw(NormSpec("rows", (23, 19)), op, F32), "triton", F32)


@pytest.mark.parametrize(("count", "D", "expected"), [(0, 64, (0, 1)), (7, 64, (7, 1)), (8192, 128, (1024, 8))])
def test_few_programs_share_many_tiles(count: int, D: int, expected: tuple[int, int]) -> None:
    assert backend.programs(count, D) == expected


@pytest.mark.parametrize(("count", "D"), [(4097, 2304), (9999, 7168), (1025, 128)])
def test_every_tile_has_a_program(count: int, D: int) -> None:
    programs, run_of_tiles = backend.programs(count, D)
    assert (programs - 1) * run_of_tiles < count <= programs * run_of_tiles


def test_rms_norm_rounds_to_the_input_dtype_before_the_weight() -> None:
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).to(ops.DEVICE, BF16)
    weight = torch.rand(96, generator=torch.Generator().manual_seed(1)).to(ops.DEVICE, BF16)
    wide = x.float()
    n = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    y = rms_norm(x, weight, eps=1e-5, backend="triton")
    assert (y != n.bfloat16() * weight).float().mean() < 0.01
    assert (y != (n * weight).bfloat16()).float().mean() > 0.1


@pytest.mark.parametrize("op", ["gated_rms_norm", "l2_norm"])
def test_the_others_round_once_at_the_end(op: str) -> None:
    inputs = draw(NormSpec("many", (64, 96)), op, BF16)
    exact = FUNCTIONS[op](**ops.in_float64(inputs), backend="reference").bfloat16()
    assert (run(op)(**inputs) != exact).float().mean() < 0.01


@EACH
def test_a_row_has_the_same_bits_in_every_batch(op: str) -> None:
    inputs = draw(MANY, op, BF16)
    outputs, grads = ops.run_with_gradients(run(op), inputs)
    alone = {name: x[1:, 70:71] if isinstance(x, Tensor) and x.dim() == 3 else x for name, x in inputs.items()}
    single, single_grads = ops.run_with_gradients(run(op), alone, [ops.cotangents(outputs)[0][1:, 70:71]])
    assert torch.equal(single[0], outputs[0][1:, 70:71])
    assert all(torch.equal(single_grads[name], grads[name][1:, 70:71]) for name in grads if name != "weight")


@EACH
def test_a_slice_of_the_last_axis_is_read_where_it_lies(op: str) -> None:
    inputs = draw(HEADS, op, F32)
    wide = {}
    for name in ("x", "gate"):
        if name in inputs:
            padded = torch.full((*HEADS.shape[:-1], 40), torch.nan, device=ops.DEVICE)
            padded[..., 5:21] = inputs[name]
            wide[name] = padded[..., 5:21]
            assert backend._rows(wide[name]).data_ptr() == wide[name].data_ptr()
    ops.assert_equal(ops.run_with_gradients(run(op), {**inputs, **wide}), ops.run_with_gradients(run(op), inputs))


@EACH
def test_weights_wider_than_x_keep_their_dtype_in_the_gradient(op: str) -> None:
    inputs = draw(HEADS, op, BF16)
    mixed = {name: value.float() if name in ("weight", "gate") else value for name, value in inputs.items()}
    ops.assert_matches_reference(FUNCTIONS[op], mixed, "triton", BF16)


@EACH
def test_inputs_strides_and_repeated_runs(op: str) -> None:
    inputs = draw(HEADS, op, F32)
    ops.assert_inputs_unchanged(run(op), inputs)
    ops.assert_strides_do_not_matter(run(op), inputs, F32)
    ops.assert_runs_are_identical(run(op), inputs)


@EACH
def test_the_operators_pass_opcheck(op: str) -> None:
    inputs = draw(HEADS, op, F32)
    args = [inputs[name] for name in ("x", "gate", "weight", "eps") if name in inputs]
    args += [True] if op == "gated_rms_norm" else []
    # The check that compiles takes ten times as long and is made below.
    kinds = ("test_schema", "test_autograd_registration", "test_faketensor")
    forward, backward = (getattr(backend, f"{op}_triton{suffix}") for suffix in ("", "_backward"))
    torch.library.opcheck(forward, ops.requiring_grad(*args), test_utils=kinds)
    torch.library.opcheck(backward, (torch.randn_like(inputs["x"]), *args), test_utils=kinds)


@EACH
def test_the_compiler_sees_one_operator(op: str) -> None:
    ops.assert_compiles_whole(run(op), draw(HEADS, op, F32))


@EACH
def test_the_kernels_run_only_when_asked_for_by_name(op: str) -> None:
    inputs = draw(HEADS, op, F32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        FUNCTIONS[op](**inputs)
        run(op)(**inputs)
    ran = [event.key for event in profile.events() if event.key.startswith(f"kimi_linear::{op}")]
    assert [key == f"kimi_linear::{op}_triton" for key in ran] == [False, True]
