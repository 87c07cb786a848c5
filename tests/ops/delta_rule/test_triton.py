"""The Triton kernels, without a GPU interpreted, which is slow: the contracts at their smallest, and their own."""

import dataclasses
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from contracts import test_delta_rule as contract
from contracts import test_delta_rule_compile as compile_contract
from contracts import test_delta_rule_decode as decode_contract
from kimi_linear.base.numerics import tolerance
from kimi_linear.ops import delta_rule_decode
from kimi_linear.ops.delta_rule.specs import CoreCase, DeltaRuleCase, KdaCase
from kimi_linear.ops.delta_rule.triton import backend
from support import ops
from support.delta_rule import PARAMETERS, call, draw, errors, reference, run
from support.source_tree import ROOT

pytestmark = [
    ops.TRITON,
    # The interpreter computes with numpy, which warns where a sigmoid's exponential is infinite, as it should be.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    # It takes a loop's bound for a scalar, which numpy 2.3 warns of and 2.4 refuses.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]
F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ONE: dict[str, Any] = {"H": 1}
GROUP: dict[str, Any] = {"H": 1, "HV": 2}
EXTREME: dict[str, Any] = {"logits": 50.0, "bias": 8.0, "rate": 4.0, **ONE}
PACK = (5, 0, 17, 1)
CORE = [
    *(CoreCase(name=f"T{T}", T=T, **ONE) for T in (0, 1, 15, 16, 17, 33)),
    CoreCase(name="grouped_bounded", lower_bound=-5.0, T=17, **GROUP),
    CoreCase(name="bounded_no_rate", lower_bound=-5.0, has_rate=False, T=17, **ONE),
    CoreCase(name="no_bias_no_state", has_bias=False, initial_state=False, T=17, **ONE),
    CoreCase(name="neg_eigval", allow_neg_eigval=True, T=17, **ONE),
    CoreCase(name="K20_V36", K=20, V=36, T=17, **ONE),
    # Wide enough for the state to be read in parts.
    CoreCase(name="K70_V3", K=70, V=3, T=17, **ONE),
    CoreCase(name="zero_rows", zero_rows=True, T=17, **ONE),
    CoreCase(name="extreme", T=17, **{**EXTREME, "H": 2}),
    CoreCase(name="extreme_bounded", T=17, lower_bound=-5.0, **EXTREME),
    CoreCase(name="packed", lengths=PACK, **ONE),
]
FREE = [
    *(DeltaRuleCase(name=f"T{T}", T=T, **ONE) for T in (0, 1, 17)),
    *(DeltaRuleCase(name=f"pre_T{T}", read="pre", T=T, **ONE) for T in (1, 17)),
    DeltaRuleCase(name="scalar", scalar_decay=True, erase="key", T=17, **GROUP),
    DeltaRuleCase(name="pre_scalar", scalar_decay=True, read="pre", T=17, **ONE),
    DeltaRuleCase(name="no_erase", erase="none", T=17, **ONE),
    DeltaRuleCase(name="no_erase_scalar", erase="none", scalar_decay=True, T=17, **ONE),
    DeltaRuleCase(name="key_erase", erase="key", T=17, **GROUP),
    DeltaRuleCase(name="K1_V1", K=1, V=1, T=17, **ONE),
    DeltaRuleCase(name="identical_undecayed", keys="identical", gate="none", beta=1.0, T=17, K=16, **ONE),
    *(
        DeltaRuleCase(name=f"gate_{g}", gate=g, T=17, **ONE)
        for g in ("closed", "separators", "strong", "mixed", "none")
    ),
    *(DeltaRuleCase(name=f"gate_{g}_scalar", gate=g, scalar_decay=True, T=17, **ONE) for g in ("separators", "strong")),
    DeltaRuleCase(name="packed", lengths=PACK, erase="key", read="pre", **ONE),
    DeltaRuleCase(name="packed_no_state", lengths=(1, 1, 1), initial_state=False, **ONE),
]
WEIGHED = [
    KdaCase(name="T17", T=17, **GROUP),
    KdaCase(name="scalar", T=17, scalar_decay=True, **ONE),
    KdaCase(name="beta_2", T=17, beta=2.0, gate="slow", K=16, **ONE),
    KdaCase(name="packed", lengths=PACK, **ONE),
]
# Half precision takes chunks of 16, 32 and 64. With a handful of channels a gate's gradient is a difference of few
# terms and measures their rounding: the fused operator is held to the table at the released model's 128 channels.
WIDER: dict[str, Any] = {"H": 1, "K": 128, "V": 128}
HALF = [
    ("kda_core", CoreCase(name="T17", T=17, **WIDER), BF16),
    ("kda_core", CoreCase(name="bounded_T17", lower_bound=-5.0, T=17, **WIDER), BF16),
    ("kda_core", CoreCase(name="extreme", T=33, **EXTREME, K=32, V=32), BF16),
    ("kda_core", CoreCase(name="T16", T=16, **WIDER), FP16),
    ("kda_core", CoreCase(name="packed", lengths=PACK, **ONE), BF16),
    ("delta_rule", DeltaRuleCase(name="pre_T17", read="pre", T=17, **ONE), BF16),
    ("delta_rule", DeltaRuleCase(name="separators_T65", gate="separators", T=65, **ONE), BF16),
    ("delta_rule", DeltaRuleCase(name="scalar_T65", scalar_decay=True, T=65, **ONE), BF16),
    ("delta_rule", DeltaRuleCase(name="mixed_T33", gate="mixed", T=33, erase="key", **ONE), FP16),
    ("kda", KdaCase(name="T33", T=33, **GROUP), BF16),
]
CASES = [
    *(("kda_core", case, F32) for case in CORE),
    *(("delta_rule", case, F32) for case in FREE),
    *(("kda", case, F32) for case in WEIGHED),
    *HALF,
]
each_case = pytest.mark.parametrize(
    ("op", "case", "dtype"), CASES, ids=[f"{op}-{case.name}-{str(dtype)[6:]}" for op, case, dtype in CASES]
)
DENSE = {
    "kda_core": CoreCase(name="dense", T=17, B=2, **ONE),
    "delta_rule": DeltaRuleCase(name="dense", T=17, B=2, **ONE),
}
each_op = pytest.mark.parametrize("op", DENSE)


@pytest.fixture(autouse=True)
def chunks_only(monkeypatch) -> None:
    """Cut short sequences into chunks too; test_tokens.py is about those that are walked."""
    from kimi_linear.ops.delta_rule.triton import tokens

    monkeypatch.setattr(tokens, "SHORT", -1)


def parameter_errors(
    inputs: dict[str, Any], found: dict[str, Tensor], expected: dict[str, Tensor], limit: float
) -> dict[str, float]:
    """Return the gradients that sum over tokens whose error is beyond the limit times the sum of magnitudes.

    In half precision every summand is off by about the limit, neighbours in the same direction, and a few dozen of
    them cancel at these sizes: held against the sum itself, the error would measure the cancellation.
    """
    inputs, found, expected = ops.on_cpu(inputs), ops.on_cpu(found), ops.on_cpu(expected)
    u = inputs["gate"].double() + inputs["dt_bias"].double().view(inputs["gate"].shape[2:])
    # d_gate = d_g * (-rate sigmoid(u)), and log(rate) gets d_g * (-rate softplus(u)).
    weight = u if inputs["lower_bound"] is not None else torch.nn.functional.softplus(u) / u.sigmoid()
    of_bias = expected["d_gate"].flatten(0, 1)
    of_rate = (expected["d_gate"] * weight).flatten(0, 1)
    sizes = {"d_dt_bias": of_bias.abs().sum(0).flatten(), "d_A_log": of_rate.abs().sum((0, 2))}
    errors = {
        name: ((found[name].double() - expected[name]).norm() / size.norm()).item() for name, size in sizes.items()
    }
    return {name: error for name, error in errors.items() if not error <= limit}


@each_case
def test_results_and_every_gradient_match_the_float64_reference(op, case, dtype) -> None:
    inputs = draw(case, dtype)
    with ops.nan_in_new_memory():
        found = run(op, inputs, "triton")
    expected = reference(op, inputs, found)
    if dtype == F32:
        assert errors(found, expected, dtype) == {}
        return
    apart = {f"d_{name}" for name in PARAMETERS[op]}
    if case.name == "extreme":
        apart.add("d_gate")
    rest, expected_rest = ({n: x for n, x in of.items() if n not in apart} for of in (found, expected))
    assert errors(rest, expected_rest, dtype) == {}
    if case.name == "extreme":
        # What products in bfloat16 leave of the gate's gradients here is beyond the table; see the operator's README.
        assert all(found[name].isfinite().all() for name in apart)
    elif PARAMETERS[op]:
        assert parameter_errors(inputs, found, expected, tolerance(dtype).gate_gradient) == {}


@pytest.mark.parametrize("C", [16, 32, 64])
@pytest.mark.parametrize(
    ("op", "case"),
    [
        ("kda_core", CoreCase(name="core", T=65, **ONE)),
        ("delta_rule", DeltaRuleCase(name="pre", T=65, read="pre", gate="mixed", **ONE)),
        ("delta_rule", DeltaRuleCase(name="scalar", T=65, scalar_decay=True, gate="separators", **ONE)),
    ],
    ids=["core", "pre", "scalar"],
)
def test_every_chunk_length_is_exact_in_float32(op, case, C, monkeypatch) -> None:
    from kimi_linear.ops.delta_rule.triton import plan

    chosen = plan.tiles
    monkeypatch.setattr(plan, "tiles", lambda *given: dataclasses.replace(chosen(*given), chunk=C))
    inputs = draw(case, F32)
    found = run(op, inputs, "triton")
    assert errors(found, reference(op, inputs, found), F32) == {}


@each_op
@pytest.mark.parametrize("t", [0, 1, 16])
def test_a_run_split_at_any_token_equals_the_whole(op, t) -> None:
    inputs = draw(dataclasses.replace(DENSE[op], T=18, B=1), F32)
    contract.assert_close(contract.in_two(op, "triton", t)(**inputs), call(op, inputs, "triton"))


@each_op
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(op) -> None:
    inputs = draw(dataclasses.replace(DENSE[op], T=5), BF16)
    found = run(op, inputs, "triton")
    cotangents = ops.cotangents([found["o"], found["final_state"]])
    tokens = [n for n, x in inputs.items() if isinstance(x, Tensor) and n not in PARAMETERS[op]]
    alone = {**inputs, **{n: inputs[n][:1] for n in tokens}}
    single = run(op, alone, "triton", [x[:1] for x in cotangents])
    for name, x in single.items():
        if name[2:] not in PARAMETERS[op]:
            assert torch.equal(x, found[name][:1]), name


@each_op
def test_a_sequence_has_the_same_bits_in_every_pack(op) -> None:
    inputs = draw(dataclasses.replace(DENSE[op], lengths=(5, 2), B=1), BF16)
    found = run(op, inputs, "triton")
    cotangents = ops.cotangents([found["o"], found["final_state"]])
    tokens = [n for n, x in inputs.items() if isinstance(x, Tensor) and x.dim() > 2 and n != "initial_state"]
    first = {**inputs, **{n: inputs[n][:, :5] for n in tokens}, "cu_seqlens": torch.tensor([0, 5], device=ops.DEVICE)}
    first["initial_state"] = inputs["initial_state"][:1]
    single = run(op, first, "triton", [cotangents[0][:, :5], cotangents[1][:1]])
    for name, x in single.items():
        if name[2:] not in PARAMETERS[op]:
            whole = found[name][:1] if "state" in name else found[name][:, :5]
            assert torch.equal(x, whole), name


@each_op
def test_two_runs_are_bit_identical(op) -> None:
    contract.test_two_runs_are_bit_identical(op, "triton", dataclasses.replace(DENSE[op], B=1))


@each_op
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_inputs_and_gradients_are_left_as_they_were(op, dtype) -> None:
    contract.test_inputs_and_gradients_are_left_as_they_were_and_never_returned(op, "triton", DENSE[op], dtype)


@each_op
def test_memory_layout_does_not_matter(op) -> None:
    contract.test_memory_layout_of_the_inputs_does_not_matter(op, "triton", dataclasses.replace(DENSE[op], B=1, T=5))


def opcheck(operator: Any, *arguments: Any) -> None:
    """Run torch's checks but the one that compiles, which takes ten times as long and is made below."""
    kinds = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, arguments, test_utils=kinds)


def test_the_operators_pass_opcheck() -> None:
    inputs = compile_contract.positional(draw(CoreCase(name="x", T=3, K=3, V=2, **ONE)))
    for keep in ("inputs", "states"):
        *outputs, kept = backend.kda_core_triton(*inputs, keep)
        opcheck(backend.kda_core_triton, *ops.requiring_grad(*inputs), keep)
        opcheck(backend.kda_core_triton_backward, *ops.cotangents(outputs), *inputs, keep, kept)
    case = DeltaRuleCase(name="x", lengths=(2, 0, 1), erase="key", read="pre", K=3, V=2, **ONE)
    inputs = (*compile_contract.positional(draw(case)), None)
    for keep in ("inputs", "factors"):
        *outputs, kept = backend.delta_rule_triton(*inputs, keep)
        opcheck(backend.delta_rule_triton, *ops.requiring_grad(*inputs), keep)
        opcheck(backend.delta_rule_triton_backward, *ops.cotangents(outputs), *inputs, keep, kept)


def test_the_compiler_sees_one_operator() -> None:
    inputs = draw(CoreCase(name="x", T=3, K=3, V=2, **ONE))
    ops.assert_compiles_whole(lambda **x: call("kda_core", x, "triton"), inputs)


DECODE = [case for case in decode_contract.CASES if case[1].name != "K60_V100"]


@pytest.mark.parametrize(("op", "case"), DECODE, ids=[f"{op}-{case.name}" for op, case in DECODE])
def test_tokens_one_by_one_equal_the_whole_prompt(op, case) -> None:
    small = dataclasses.replace(case, T=3, B=2, HV=2)
    decode_contract.test_tokens_one_by_one_equal_the_whole_prompt(op, "triton", small, F32)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_tokens_one_by_one_in_half_precision(dtype) -> None:
    case = CoreCase(name="half", T=3, B=2, HV=4, K=20, V=36)
    decode_contract.test_tokens_one_by_one_equal_the_whole_prompt("kda_core", "triton", case, dtype)


@pytest.mark.parametrize(
    "check",
    [
        decode_contract.test_states_of_other_slots_stay_bit_identical,
        decode_contract.test_slot_minus_one_is_skipped,
        decode_contract.test_minus_one_before_slot_zero_is_no_run_of_slots,
        decode_contract.test_a_sequence_does_not_depend_on_its_batch,
        decode_contract.test_a_pool_may_be_a_slice_of_a_larger_one,
        decode_contract.test_inputs_are_left_as_they_were,
        decode_contract.test_a_call_that_needs_a_gradient_is_refused,
    ],
    ids=lambda check: check.__name__.removeprefix("test_"),
)
@each_op
def test_decoding_keeps_its_contract(op, check) -> None:
    check(op, "triton")


def test_decode_passes_opcheck() -> None:
    x = compile_contract.token("delta_rule")
    inputs = [x[n] for n in ("q", "k", "erase_key", "write_value", "log_decay")]
    pool, slots = torch.randn(3, 4, 3, 2, device=ops.DEVICE), torch.tensor([2, -1], device=ops.DEVICE)
    opcheck(backend.delta_rule_decode_triton, *inputs, pool, slots, 0.5, "post")
    x = compile_contract.token("kda_core")
    inputs = [x[n] for n in ("q", "k", "v", "gate", "beta", "A_log", "dt_bias")]
    opcheck(backend.kda_core_decode_triton, *inputs, pool, slots, None, 1.0, 0.5)


def test_a_slot_outside_of_the_pool_is_skipped_by_the_kernel() -> None:
    """On a GPU nobody looks at the slots first."""
    from kimi_linear.ops.delta_rule.triton import decode
    from kimi_linear.ops.delta_rule.triton.inputs import Inputs

    x = draw(DeltaRuleCase(name="x", T=1, B=2))
    q, k, e, z, g = (x[n][:, 0] for n in ("q", "k", "erase_key", "write_value", "log_decay"))
    pool, slots = torch.ones(3, 2, 8, 6, device=ops.DEVICE), torch.tensor([3, 2**31], device=ops.DEVICE)
    inputs = Inputs(q, k, e, z, g, None, None, None, None, 1.0)
    assert torch.equal(decode.decode(inputs, pool, slots), torch.zeros_like(z))
    assert torch.equal(pool, torch.ones_like(pool))


@ops.CPU
def test_the_cpu_is_interpreted_only_when_asked_for_by_name() -> None:
    x = {n: v[:, 0] if isinstance(v, Tensor) and v.dim() > 2 else v for n, v in draw(DENSE["delta_rule"]).items()}
    tokens = {n: x[n] for n in ("q", "k", "erase_key", "write_value", "log_decay")}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for name in (None, "triton"):
            delta_rule_decode(**tokens, pool=torch.zeros(2, 1, 8, 6), slots=torch.arange(2), backend=name)
    ran = [event.key for event in profile.events() if event.key.startswith("kimi_linear::delta_rule_decode")]
    assert [key == "kimi_linear::delta_rule_decode_triton" for key in ran] == [False, True]


def test_a_wrong_sum_does_not_pass_for_rounding() -> None:
    case = CoreCase(name="x", T=17, **ONE)
    inputs = draw(case, F32)
    found = run("kda_core", inputs, "chunk")
    expected = reference("kda_core", inputs, found)
    assert parameter_errors(inputs, found, expected, tolerance(BF16).gate_gradient) == {}
    found = {**found, **{name: -found[name] for name in ("d_dt_bias", "d_A_log")}}
    assert parameter_errors(inputs, found, expected, tolerance(BF16).gate_gradient).keys() == {"d_dt_bias", "d_A_log"}


COMPILE = """
import compile_gpu
for name, call in compile_gpu.calls():
    if name in ("delta_rule D=64 bfloat16 H=4 T=16 core", "delta_rule D=64 float32 N=1 decode core"):
        for kernel, args, options in compile_gpu.launches(call):
            if kernel.__name__ in ("prepare_kernel", "finish_kernel", "decode_kernel"):
                print(kernel.__name__, compile_gpu.compile_launch(kernel, args, options)["spilled"])
"""


def test_the_cheapest_kernels_compile_for_a_gpu_without_a_spill() -> None:
    """In a process of its own, for here kernels are interpreted. scripts/compile_gpu.py compiles all of them."""
    pytest.importorskip("triton.backends.nvidia", reason="this triton has no compiler for NVIDIA's GPUs")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'scripts'}"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()) == {"prepare_kernel 0", "finish_kernel 0", "decode_kernel 0"}
