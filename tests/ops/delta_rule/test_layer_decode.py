"""A layer's decode step as one operator: the operators one after the other, and the kernel that stands for them."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_linear.base import env
from kimi_linear.base.numerics import relative_error, tolerance
from kimi_linear.nn.mixers import MIXERS, KDAConfig
from kimi_linear.ops import (
    KDAPools,
    gated_rms_norm,
    kda_core,
    kda_core_decode,
    kda_layer_decode,
    short_conv,
    short_conv_decode,
)
from kimi_linear.ops.delta_rule.triton.layer_backend import kda_layer_decode_triton
from support import ops
from support.layer_decode import POOLS, ROWS, Case, draw, mapped, run
from support.source_tree import ROOT

pytestmark = [
    # The interpreter computes with numpy, which warns where a sigmoid's exponential is infinite, as it should be.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    # It takes a loop's bound for a scalar, which numpy 2.3 warns of and 2.4 refuses.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]
F64, F32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
every_backend = pytest.mark.parametrize("backend", ["plain", pytest.param("triton", marks=ops.TRITON)])
CASES = [
    Case(),
    Case(name="grouped", H=2, HV=4, N=2),
    Case(name="group_of_3", H=1, HV=3, N=1),
    Case(name="bounded", lower_bound=-5.0, N=1),
    Case(name="bounded_no_rate", lower_bound=-5.0, has_rate=False, has_bias=False, N=1),
    Case(name="no_bias", has_bias=False, N=1),
    Case(name="neg_eigval", allow_neg_eigval=True, N=1),
    Case(name="silu", activation="silu", N=1),
    Case(name="W1", W=1, N=1),
    Case(name="W2", W=2, N=1),
    Case(name="W3", W=3, N=1),
    Case(name="W16", W=16, H=1, HV=1, N=1),
    Case(name="K20_V36", K=20, V=36, H=1, HV=2, N=1),
    Case(name="K1_V1", K=1, V=1, N=2),
    # Values in blocks of 64 and of 32, the last block not full.
    Case(name="K128_V200", K=128, V=200, H=1, HV=2, N=1, W=3),
    Case(name="K256_V136", K=256, V=136, H=1, HV=1, N=1),
    Case(name="extreme", logits=50.0, N=2),
    Case(name="narrow_states", states=BF16, HV=4, N=2),
]
WIDE = {"K": 64, "V": 64}
HALF = [
    (Case(name="wide", **WIDE), BF16),
    (Case(name="wide_grouped", HV=4, lower_bound=-5.0, activation="silu", **WIDE), BF16),
    (Case(name="narrow_states", states=BF16, **WIDE), BF16),
    (Case(name="wide", **WIDE), FP16),
    (Case(name="narrow_states", states=BF16, allow_neg_eigval=True, **WIDE), FP16),
]
each_case = pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, F32) for case in CASES), *HALF],
    ids=lambda x: x.name if isinstance(x, Case) else str(x)[6:],
)


def in_float64(inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return y and the pools of the three operators' references, written out."""
    x = mapped(inputs, lambda x: x.detach().double().cpu())
    weights, pools, slots = x["weights"], x["pools"], x["slots"].cpu()
    for name in ("q", "k", "v"):
        taps, history = getattr(weights, f"conv_{name}"), getattr(pools, f"conv_{name}")
        y = short_conv_decode(x[name].flatten(1), taps, history, slots, backend="reference")
        x[name] = y.view_as(x[name])
    o = kda_core_decode(
        *(x[name] for name in ROWS[:5]),
        *(weights.A_log, weights.dt_bias, pools.recurrent, slots),
        lower_bound=x["lower_bound"],
        allow_neg_eigval=x["allow_neg_eigval"],
        backend="reference",
    )
    y = gated_rms_norm(o, x["output_gate"], weights.norm, eps=x["eps"], activation=x["activation"], backend="reference")
    return y, {name: getattr(pools, name) for name in POOLS}


def assert_within(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float, states: torch.dtype) -> None:
    """Histories are copies of inputs; states are within the limit, or that of a narrow pool."""
    assert all(torch.equal(found[name].double().cpu(), expected[name].double().cpu()) for name in POOLS[:3])
    limit = max(limit, tolerance(BF16).output) if states == BF16 else limit
    assert relative_error(found["recurrent"].cpu(), expected["recurrent"].cpu()) <= limit


@pytest.mark.parametrize("backend", ["plain", "reference"])
@each_case
def test_the_composition_is_the_three_operators(case, dtype, backend) -> None:
    inputs = draw(case, dtype)
    with ops.nan_in_new_memory():
        y, pools = run(inputs, backend)
    expected, expected_pools = in_float64(inputs)
    # Three operators in a row, each within the table's row for one.
    limit = 3 * tolerance(dtype).output
    assert y.dtype == dtype
    assert relative_error(y.cpu(), expected) <= limit
    assert_within(pools, expected_pools, limit, inputs["pools"].recurrent.dtype)


def test_float64_is_computed_in_float64() -> None:
    inputs = draw(Case(HV=4), F64)
    y, pools = run(inputs, None)
    expected, expected_pools = in_float64(inputs)
    assert relative_error(y.cpu(), expected) <= tolerance(F64).output
    assert_within(pools, expected_pools, tolerance(F64).output, F64)


@ops.TRITON
@each_case
def test_the_kernel_equals_the_composition(case, dtype) -> None:
    """Half precision agrees in nearly every bit, because both round at the same places."""
    inputs = draw(case, dtype)
    with ops.nan_in_new_memory():
        y, pools = run(inputs, "triton")
    expected, expected_pools = run(inputs, "plain")
    limit = tolerance(dtype).output if dtype != F32 else tolerance(F32).output / 10
    assert y.dtype == dtype
    assert relative_error(y, expected) <= limit
    assert dtype == F32 or (y == expected).float().mean() >= 0.95
    assert_within(pools, expected_pools, tolerance(F32).output / 10, inputs["pools"].recurrent.dtype)


def step(inputs: dict[str, Any], pools: KDAPools, t: int, backend: str) -> Tensor:
    """Advance by token t of rows [N, T, ..]."""
    now = {name: inputs[name][:, t] for name in ROWS}
    return kda_layer_decode(**{**inputs, **now, "pools": pools}, backend=backend)


@every_backend
@pytest.mark.parametrize(
    "case",
    [Case(name="W4", T=6, H=1, N=2), Case(name="W1", T=4, N=1, W=1, lower_bound=-5.0), Case(name="W2", T=4, N=1, W=2)],
    ids=lambda case: case.name,
)
def test_tokens_one_by_one_equal_the_whole_prompt(case, backend) -> None:
    inputs = draw(case)
    x = mapped(inputs, lambda x: x.double().cpu())
    slots, weights, pools = inputs["slots"].cpu(), x["weights"], x["pools"]
    outputs = torch.stack([step(inputs, inputs["pools"], t, backend) for t in range(case.T)], 1)
    for name in ("q", "k", "v"):
        tail, taps = getattr(pools, f"conv_{name}")[slots], getattr(weights, f"conv_{name}")
        y, tail = short_conv(x[name].flatten(2), taps, initial_state=tail, backend="reference")
        x[name] = y.view_as(x[name])
        assert torch.equal(getattr(inputs["pools"], f"conv_{name}").double().cpu()[slots], tail)
    o, state = kda_core(
        *(x[name] for name in ROWS[:5]),
        *(weights.A_log, weights.dt_bias),
        lower_bound=case.lower_bound,
        initial_state=pools.recurrent[slots],
        backend="reference",
    )
    expected = gated_rms_norm(o, x["output_gate"], weights.norm, eps=1e-5, backend="reference")
    assert relative_error(outputs.cpu(), expected) <= tolerance(F32).output
    assert relative_error(inputs["pools"].recurrent.cpu()[slots], state) <= tolerance(F32).output


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32)


@every_backend
@pytest.mark.parametrize("states", [F32, BF16])
def test_other_slots_stay_bit_identical_in_every_pool(backend, states) -> None:
    inputs = draw(Case(S=7, states=states), BF16)
    named = inputs["slots"].tolist()
    others = [slot for slot in range(7) if slot not in named]
    for name in POOLS:
        pool = getattr(inputs["pools"], name)
        pool[others[0]], pool[others[1]] = float("nan"), 1e30
        # Not the NaN that a conversion gives.
        bits(pool[others[0]]).add_(1)
    _, after = run(inputs, backend)
    for name, found in after.items():
        pool = getattr(inputs["pools"], name)
        assert torch.equal(bits(found[others]), bits(pool[others])), name
        assert found[named].isfinite().all()
        assert not any(torch.equal(found[slot], pool[slot]) for slot in named), name


@every_backend
def test_slot_minus_one_is_skipped(backend) -> None:
    inputs = draw(Case(HV=4))
    y, after = run(inputs, backend)
    slots = inputs["slots"].clone()
    slots[1] = -1
    found, pools = run({**inputs, "slots": slots}, backend)
    assert torch.equal(found[[0, 2]], y[[0, 2]])
    assert torch.equal(found[1], torch.zeros_like(found[1]))
    skipped = int(inputs["slots"][1])
    for name, pool in pools.items():
        rest = [slot for slot in range(5) if slot != skipped]
        assert torch.equal(pool[rest], after[name][rest])
        assert torch.equal(pool[skipped], getattr(inputs["pools"], name)[skipped])


@ops.TRITON
def test_a_slot_outside_of_the_pools_is_skipped_by_the_kernel() -> None:
    """On a GPU nobody looks at the slots first."""
    from kimi_linear.ops.delta_rule.triton.layer_token import layer_token

    inputs = draw(Case(V=36, HV=4))
    weights, pools = (list(inputs[name]) for name in ("weights", "pools"))
    before = [pool.clone() for pool in pools]
    slots = torch.tensor([5, 2**31, -2], device=ops.DEVICE)
    with ops.nan_in_new_memory():
        y = layer_token(
            tuple(inputs[name] for name in ROWS), [x.flatten(1) for x in weights[:3]] + weights[3:], pools, slots,
            None, 1.0, 1.0, 1e-5, False,
        )  # fmt: skip
    assert torch.equal(y, torch.zeros_like(y))
    assert all(torch.equal(pool, old) for pool, old in zip(pools, before, strict=True))


@every_backend
@pytest.mark.parametrize("rows", [0, 2])
def test_nothing_to_do(backend, rows) -> None:
    """No sequences at all, or none of them on a slot."""
    inputs = draw(Case(N=rows))
    inputs["slots"] = torch.full((rows,), -1, dtype=torch.int32, device=ops.DEVICE)
    y, pools = run(inputs, backend)
    assert torch.equal(y, torch.zeros_like(inputs["v"]))
    assert all(torch.equal(pool, getattr(inputs["pools"], name)) for name, pool in pools.items())


@every_backend
def test_which_slots_are_named_changes_no_bit(backend) -> None:
    inputs = draw(Case())
    y, pools = run(inputs, backend)
    order = torch.tensor([3, 0, 4, 1, 2], device=ops.DEVICE)
    moved = KDAPools(*(pool[order] for pool in inputs["pools"]))
    where = torch.argsort(order)[inputs["slots"]].int()
    found, moved_pools = run({**inputs, "pools": moved, "slots": where}, backend)
    assert torch.equal(found, y)
    assert all(torch.equal(moved_pools[name], pools[name][order]) for name in POOLS)


@every_backend
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(backend) -> None:
    inputs = draw(Case(N=4, K=5, V=3, HV=4), BF16)
    y, pools = run(inputs, backend)
    for n in range(4):
        one = {name: inputs[name][n : n + 1] for name in (*ROWS, "slots")}
        found, own = run({**inputs, **one}, backend)
        assert torch.equal(found[0], y[n])
        slot = inputs["slots"][n]
        assert all(torch.equal(own[name][slot], pools[name][slot]) for name in POOLS)


@every_backend
def test_two_runs_are_bit_identical_and_leave_the_inputs(backend) -> None:
    inputs = draw(Case(N=2, H=1), BF16)
    before = mapped(inputs, torch.clone)
    (y, pools), (other, other_pools) = run(inputs, backend), run(inputs, backend)
    assert torch.equal(y, other)
    assert all(torch.equal(pools[name], other_pools[name]) for name in POOLS)
    kda_layer_decode(**inputs, backend=backend)
    assert all(torch.equal(inputs[name], before[name]) for name in (*ROWS, "slots"))
    for name, x in before["weights"]._asdict().items():
        assert torch.equal(getattr(inputs["weights"], name), x), name


def sliced(pools: KDAPools) -> tuple[KDAPools, KDAPools]:
    """Return the same pools as one layer of pools of two, with the last two axes exchanged, and the other layer."""

    def one(pool: Tensor) -> tuple[Tensor, Tensor]:
        layers = pool.new_full((pool.shape[0], 2, *pool.mT.shape[1:]), 1e30).mT
        layers[:, 1] = pool
        return layers[:, 1], layers[:, 0]

    both = [one(pool) for pool in pools]
    return KDAPools(*(x for x, _ in both)), KDAPools(*(x for _, x in both))


@every_backend
def test_pools_may_be_slices_of_larger_ones(backend) -> None:
    inputs = draw(Case(HV=4))
    y, expected = run(inputs, backend)
    pools, others = sliced(inputs["pools"])
    found = kda_layer_decode(**{**inputs, "pools": pools}, backend=backend)
    torch.testing.assert_close(found, y)
    for name in POOLS:
        assert not getattr(pools, name).is_contiguous()
        torch.testing.assert_close(getattr(pools, name), expected[name])
        assert (getattr(others, name) == 1e30).all()


@every_backend
def test_strides_of_inputs_and_weights_do_not_matter(backend) -> None:
    inputs = draw(Case())
    y, pools = run(inputs, backend)
    spread = mapped({**inputs, "slots": ops.strided(inputs["slots"])}, ops.strided)
    found = kda_layer_decode(**spread, backend=backend)
    assert relative_error(found, y) <= tolerance(F32).output
    for name in POOLS:
        assert relative_error(getattr(spread["pools"], name), pools[name]) <= tolerance(F32).output


@every_backend
def test_the_callers_autocast_changes_nothing(backend) -> None:
    inputs = draw(Case())
    y, pools = run(inputs, backend)
    with torch.autocast(ops.DEVICE, dtype=BF16):
        found, inside = run(inputs, backend)
    assert torch.equal(found, y)
    assert all(torch.equal(inside[name], pools[name]) for name in POOLS)


def ran(inputs: dict[str, Any], backend: str | None) -> set[str]:
    """Return the operators of this package that a call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        kda_layer_decode(**inputs, backend=backend)
    return {event.key.split("::")[1] for event in profile.events() if event.key.startswith("kimi_linear::")}


def test_the_kernel_runs_only_when_asked_for_by_name() -> None:
    inputs = draw(Case())
    operators = ("short_conv_decode", "kda_core_decode", "gated_rms_norm")
    assert ran(inputs, "reference") >= {f"{name}_reference" for name in operators[::2]}
    unasked = ran(inputs, None)
    assert all(any(key.startswith(name) for key in unasked) for name in operators)
    assert not any("triton" in key for key in unasked)


@ops.TRITON
def test_the_kernel_is_one_operator() -> None:
    assert ran(draw(Case()), "triton") == {"kda_layer_decode_triton"}


@ops.TRITON
def test_the_kernel_passes_opcheck() -> None:
    inputs = draw(Case(K=3, V=2))
    weights, pools = (list(inputs[name]) for name in ("weights", "pools"))
    arguments = (*(inputs[name] for name in ROWS), *(x.flatten(1) for x in weights[:3]), *weights[3:], *pools)
    torch.library.opcheck(
        kda_layer_decode_triton,
        (*arguments, inputs["slots"], None, 1.0, 0.5, 1e-5, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@every_backend
@pytest.mark.parametrize("states", [F32, BF16])
def test_compiles_whole_and_updates_the_pools(backend, states) -> None:
    torch.compiler.reset()
    inputs = draw(Case(states=states))
    y, expected = run(inputs, backend)
    nodes: list[str] = []

    def record(graph: torch.fx.GraphModule, example: Any) -> Any:
        nodes.extend(str(node.target) for node in graph.graph.nodes if "kimi_linear" in str(node.target))
        return graph.forward

    given = mapped(inputs, torch.clone)
    compiled = torch.compile(lambda: kda_layer_decode(**given, backend=backend), fullgraph=True, backend=record)
    assert torch.equal(compiled(), y)
    assert all(torch.equal(getattr(given["pools"], name), pool) for name, pool in expected.items())
    assert len(nodes) == (1 if backend == "triton" else 5), nodes


@ops.TRITON
@torch.no_grad()
def test_the_layer_runs_on_the_kernel_when_asked() -> None:
    torch.manual_seed(0)
    layer = MIXERS.build(KDAConfig(num_heads=1, num_v_heads=2, head_dim=8, conv_size=3), 12).to(ops.DEVICE)
    x = torch.randn(2, 4, 12).to(ops.DEVICE)
    state = layer.new_state(2, device=x.device, dtype=F32)
    layer(x[:, :3], state)
    other = state.fork()
    expected = layer(x[:, 3:], state)
    with env.changed("KIMI_LINEAR_BACKEND", "triton"), torch.profiler.profile() as profile:
        y = layer(x[:, 3:], other)
    assert "kimi_linear::kda_layer_decode_triton" in {event.key for event in profile.events()}
    ops.assert_close(y, expected)
    for name, tensor in state.tensors().items():
        ops.assert_close(other.tensors()[name], tensor)


COMPILE = """
import compile_gpu
for name, call in compile_gpu.calls():
    if name == "layer_token D=64 bfloat16 group=1 state=float32":
        for kernel, args, options in compile_gpu.launches(call):
            print(kernel.__name__, compile_gpu.compile_launch(kernel, args, options)["spilled"])
"""


@ops.TRITON
def test_the_kernel_compiles_for_a_gpu_without_a_spill() -> None:
    """In a process of its own, for here kernels are interpreted. scripts/compile_gpu.py compiles all of them."""
    pytest.importorskip("triton.backends.nvidia", reason="this triton has no compiler for NVIDIA's GPUs")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'scripts'}"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["layer_token_kernel 0"]


def test_a_hook_on_the_norm_of_a_layer_fires_in_decoding_too() -> None:
    """Then the layer runs its parts, with the same bits."""
    from kimi_linear.nn.mixers import KDAConfig
    from kimi_linear.nn.mixers.kda.layer import KimiDeltaAttention

    layer = KimiDeltaAttention(KDAConfig(num_heads=2, head_dim=8), hidden_size=16).eval()
    x, seen = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(0)), []
    with torch.no_grad():
        expected = layer(x, layer.new_state(1, device=x.device, dtype=x.dtype))
        layer.o_norm.register_forward_hook(lambda *_: seen.append(True))
        assert torch.equal(layer(x, layer.new_state(1, device=x.device, dtype=x.dtype)), expected)
    assert seen == [True]
