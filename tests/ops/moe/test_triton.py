"""The experts in Triton, interpreted, which is slow: the contracts at their smallest, and what is their own."""

import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from kimi_linear.ops import grouped_mlp
from kimi_linear.ops.moe.specs import SPECS, MoESpec
from kimi_linear.ops.moe.triton import backend
from kimi_linear.ops.registry import Call
from support import interpreted, moe, ops
from support.source_tree import ROOT

pytestmark = [
    ops.TRITON,
    # The interpreter computes with numpy, which warns where a sigmoid's exponential is infinite, as it should be.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    # It takes a loop's bound for a scalar, which numpy 2.3 warns of and 2.4 refuses.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]
F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
BY_NAME = {spec.name: spec for spec in SPECS}
# One expert with several tiles and a last one of a single row; several blocks of columns, and steps, in each product.
BUSY = MoESpec("busy", M=33, k=1, shunned=(0, 1, 3, 4))
WIDE = MoESpec("wide", M=5, E=2, D=70, F=130)
CASES = [
    *((spec, F32) for spec in (*SPECS, BUSY, WIDE)),
    *((BY_NAME[name], BF16) for name in ("one_token", "unused_experts")),
    *((spec, BF16) for spec in (BUSY, WIDE)),
    (BY_NAME["prime"], FP16),
]


@pytest.mark.parametrize(("spec", "dtype"), CASES, ids=[f"{spec.name}-{str(dtype)[6:]}" for spec, dtype in CASES])
def test_results_and_every_gradient_match_the_float64_reference(spec: MoESpec, dtype: torch.dtype) -> None:
    ops.assert_matches_reference(grouped_mlp, moe.draw(spec, dtype), "triton", dtype)


@pytest.mark.parametrize(("mean", "dtype"), [(32, F32), (64, F32), (32, BF16), (64, BF16), (128, BF16)], ids=str)
def test_every_height_of_tiles(mean: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from kimi_linear.ops.moe.triton import launch

    chosen = launch.tiles(dtype, mean * 5, 5)
    assert chosen.rows == mean
    monkeypatch.setattr(launch, "tiles", lambda *_: chosen)
    ops.assert_matches_reference(grouped_mlp, moe.draw(BUSY, dtype), "triton", dtype)


@pytest.mark.parametrize("check", moe.CONTRACT, ids=lambda check: check.__name__)
def test_the_contract_of_the_experts_holds(check: Any) -> None:
    check("triton", BY_NAME["unused_experts"], F32)


@pytest.mark.skipif(ops.DEVICE == "cuda", reason="there the experts are looked at only in debug mode")
def test_an_expert_that_does_not_exist_is_named() -> None:
    moe.an_expert_that_does_not_exist_is_named("triton", BY_NAME["prime"], F32)


def test_no_choice_at_all_gives_zeros() -> None:
    inputs = moe.draw(BY_NAME["prime"], F32)
    inputs |= {name: inputs[name][:, :0] for name in ("weights", "experts")}
    with ops.nan_in_new_memory():
        (o,), grads = ops.run_with_gradients(moe.call("triton"), inputs)
    assert all(x.eq(0).all() for x in (o, *grads.values()))


@pytest.mark.parametrize("keep", [True, False])
def test_the_operators_pass_opcheck(keep: bool) -> None:
    """All but torch's check that compiles, which takes ten times as long and is made in the contract."""
    kinds = ("test_schema", "test_autograd_registration", "test_faketensor")
    args = tuple(moe.draw(BY_NAME["unused_experts"], F32).values())
    given = ops.requiring_grad(*args) if keep else args
    torch.library.opcheck(backend.grouped_mlp_triton, (*given, keep), test_utils=kinds)
    if keep:
        _, h1, h3 = backend.grouped_mlp_triton(*args, keep)
        backward = (torch.randn_like(args[0]), *args, h1, h3)
        torch.library.opcheck(backend.grouped_mlp_triton_backward, backward, test_utils=kinds)


@pytest.mark.parametrize(("A", "E"), [(0, 3), (1, 300), (8, 300), (64, 3), (97, 5), (700, 40)])
def test_tiles_cover_every_row_once_and_surplus_ones_have_no_expert(A: int, E: int) -> None:
    from kimi_linear.ops.moe.triton import launch

    generator = torch.Generator().manual_seed(A)
    for experts in (torch.randint(0, E, (A, 1), generator=generator), torch.full((A, 1), E // 2)):
        x = torch.empty(A, 4, dtype=BF16, device=ops.DEVICE)
        run = launch.Run(x, torch.empty(E, 6, 4, device=ops.DEVICE), experts.to(ops.DEVICE))
        counts = torch.bincount(experts.flatten(), minlength=E).tolist()
        size = run.tiles.rows
        expected = [e for e, count in enumerate(counts) for _ in range(-(-count // size))]
        assert run.count >= len(expected)
        assert run.owner.tolist() == expected + [E] * (run.count - len(expected))
        assert run.first.tolist() == list(itertools.accumulate((-(-c // size) for c in counts), initial=0))
        assert run.starts.tolist() == list(itertools.accumulate(counts, initial=0))


def test_as_many_tiles_as_there_is_room_for() -> None:
    """Each expert but one with a single row in its last tile."""
    from kimi_linear.ops.moe.triton import launch

    experts = torch.arange(5).repeat(17)[:, None].to(ops.DEVICE)
    run = launch.Run(torch.empty(85, 4, device=ops.DEVICE), torch.empty(5, 6, 4, device=ops.DEVICE), experts)
    assert run.tiles.rows == 32
    few = launch.Run(torch.empty(5, 4, device=ops.DEVICE), torch.empty(5, 6, 4, device=ops.DEVICE), experts[:5])
    assert few.count == 5
    assert few.owner.tolist() == [0, 1, 2, 3, 4]


def test_the_host_reads_no_value_and_grids_lie_along_the_first_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    from kimi_linear.ops.moe.triton import launch

    counts: list[tuple[str, int]] = []
    monkeypatch.setattr(launch, "start", lambda kernel, count, *_, **__: counts.append((kernel.__name__, count)))
    shapes = moe.on_meta(backend.grouped_mlp_triton, backend.grouped_mlp_triton_backward, BF16)
    assert shapes == ((1024, 256), (64, 128, 256), (64, 128, 256), (64, 256, 128), (1024, 8))
    # 8192 rows, tiles of 128, one block of 128 columns of F, or two of 64, and two of D.
    tiles = 64 + 64
    forward = [("gate_up_kernel", tiles), ("down_kernel", 2 * tiles), ("combine_kernel", 1024)]
    assert counts[:6] == 2 * forward
    assert counts[6:8] == [("activation_backward_kernel", 2 * tiles), ("token_backward_kernel", 2 * tiles)]
    assert counts[8:] == [("matrix_backward_kernel", 64 * 2)] * 3 + [("combine_kernel", 1024)]


def last_token(M: int, E: int) -> dict[str, torch.Tensor]:
    """Return the results of the last of M tokens, all zero but this one, which alone goes to the last of E experts.

    Of every kernel its last tile's last block of columns runs.
    """
    from kimi_linear.ops.moe.triton import launch

    D = F = 1024
    generator = torch.Generator().manual_seed(0)
    x, d_o, *matrices = (
        interpreted.sparse(*shape, dtype=BF16) for shape in ((M, D), (M, D), (E, F, D), (E, F, D), (E, D, F))
    )
    for tensor in (x, d_o, *matrices):
        tensor[-1] = torch.randn(tensor.shape[1:], generator=generator) * D**-0.5
    weights, experts = torch.ones(M, 1), torch.zeros(M, 1, dtype=torch.int64)
    experts[-1] = E - 1

    def chosen(name: str, count: int) -> range:
        surplus = 0
        if name not in ("combine_kernel", "matrix_backward_kernel"):
            run = launch.Run(x, matrices[0], experts)
            surplus = (run.count - int(run.first[-1])) * (count // run.count)
        return range(count - surplus - 1, count - surplus)

    with interpreted.programs(chosen) as seen:
        o, h1, h3 = launch.forward(x, *matrices, weights, experts, True)
        d_x, d_w1, d_w3, d_w2, d_weights = launch.backward(d_o, x, *matrices, weights, experts, h1, h3)
    assert all(len(launched.grid) == 1 for launched in seen)
    found = {"o": o, "h1": h1, "h3": h3, "x": d_x, "w1": d_w1, "w3": d_w3, "w2": d_w2, "weights": d_weights}
    return {name: tensor[-1] for name, tensor in found.items()}


@pytest.mark.skipif(ops.DEVICE != "cpu", reason="chooses programs, which only the interpreter lets it")
def test_beyond_2_31_elements_a_token_comes_out_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from kimi_linear.ops.moe.triton import launch

    monkeypatch.setattr(launch.Run, "room", lambda _, *s, dtype=BF16: interpreted.sparse(*s, dtype=dtype))
    monkeypatch.setattr(launch, "tiles", lambda *_: launch.Tiles(16, 16, 16, 256, 4, 2, (16, 16), 4))
    # Tokens and activations of 2^21 rows, and matrices of 2^11 experts, come before the ones that are looked at.
    found, alone = last_token(2**21 + 1, 2**11 + 1), last_token(1, 1)
    assert all(x.float().abs().sum() > 0 for x in alone.values())
    assert [name for name, x in alone.items() if not torch.equal(found[name], x)] == []


COMPILE = """
import compile_gpu
for name, call in compile_gpu.calls():
    if name == "moe D=2304 F=1024 E=256 bfloat16 M=1":
        for kernel, args, options in compile_gpu.launches(call):
            if kernel.__name__ in ("down_kernel", "activation_backward_kernel", "combine_kernel"):
                print(kernel.__name__, compile_gpu.compile_launch(kernel, args, options)["spilled"])
"""


def test_the_cheapest_kernels_compile_for_a_gpu_without_a_spill() -> None:
    """In a process of its own, for here kernels are interpreted. scripts/compile_gpu.py compiles all of them."""
    pytest.importorskip("triton.backends.nvidia", reason="this triton has no compiler for NVIDIA's GPUs")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'scripts'}"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()) == {"down_kernel 0", "activation_backward_kernel 0", "combine_kernel 0"}


def test_it_runs_only_when_asked_for_by_name() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for name in (None, "triton"):
            grouped_mlp(**moe.draw(BY_NAME["one_token"], F32), backend=name)
    ran = [event.key for event in profile.events() if event.key.startswith("kimi_linear::grouped_mlp")]
    assert [key == "kimi_linear::grouped_mlp_triton" for key in ran] == [False, True]


def test_a_matrix_of_2_31_elements_is_refused() -> None:
    found = backend.refuse(Call("cuda", "bfloat16", False, {"D": 2**16, "F": 2**15}))
    assert found == ["a matrix of an expert has 2^31 elements or more"]
