"""Short sequences, walked token by token by one Triton kernel: the contract of the forward at its smallest."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_linear.ops.delta_rule.specs import CoreCase, DeltaRuleCase, KdaCase
from kimi_linear.ops.delta_rule.triton import backend
from support import ops
from support.delta_rule import assert_close, call, draw, errors, reference, run

pytestmark = [
    ops.TRITON,
    # The interpreter computes with numpy, which warns where a sigmoid's exponential is infinite, as it should be.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    # It takes a loop's bound for a scalar, which numpy 2.3 warns of and 2.4 refuses.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]
F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ONE: dict[str, Any] = {"H": 1, "T": 3}
GROUP: dict[str, Any] = {"H": 1, "HV": 2, "T": 3}
EXTREME: dict[str, Any] = {"logits": 50.0, "bias": 8.0, "rate": 4.0, **ONE}
CORE = [
    *(CoreCase(name=f"T{T}", **{**ONE, "T": T}) for T in (0, 1, 2, 7)),
    CoreCase(name="grouped_bounded", lower_bound=-5.0, **GROUP),
    CoreCase(name="bounded_no_rate", lower_bound=-5.0, has_rate=False, **ONE),
    CoreCase(name="no_bias_no_state", has_bias=False, initial_state=False, B=2, **ONE),
    CoreCase(name="T0_no_state", initial_state=False, **{**ONE, "T": 0}),
    CoreCase(name="neg_eigval", allow_neg_eigval=True, **ONE),
    CoreCase(name="K20_V36", K=20, V=36, **ONE),
    CoreCase(name="zero_rows", zero_rows=True, **ONE),
    CoreCase(name="extreme", **EXTREME),
    CoreCase(name="extreme_bounded", lower_bound=-5.0, **EXTREME),
]
FREE = [
    DeltaRuleCase(name="T32", **{**ONE, "T": 32}),
    DeltaRuleCase(name="scalar", scalar_decay=True, erase="key", **GROUP),
    DeltaRuleCase(name="pre", read="pre", **GROUP),
    DeltaRuleCase(name="pre_scalar", read="pre", scalar_decay=True, erase="key", **ONE),
    DeltaRuleCase(name="no_erase", erase="none", **ONE),
    DeltaRuleCase(name="no_erase_scalar", erase="none", scalar_decay=True, initial_state=False, **ONE),
    DeltaRuleCase(name="key_erase", erase="key", B=2, **GROUP),
    DeltaRuleCase(name="two_groups", erase="key", H=2, HV=4, T=2),
    DeltaRuleCase(name="K1_V1", K=1, V=1, **ONE),
    DeltaRuleCase(name="identical_undecayed", keys="identical", gate="none", beta=1.0, K=16, **ONE),
    DeltaRuleCase(name="separators", gate="separators", **{**ONE, "T": 7}),
    DeltaRuleCase(name="closed", gate="closed", **ONE),
]
WEIGHED = [KdaCase(name="kda", **GROUP), KdaCase(name="scalar", scalar_decay=True, **ONE)]
CASES = [
    *(("kda_core", case, F32) for case in CORE),
    *(("delta_rule", case, F32) for case in FREE),
    *(("kda", case, F32) for case in WEIGHED),
    *(("kda_core", CoreCase(name="half", K=20, **GROUP), dtype) for dtype in (BF16, FP16)),
    *(("delta_rule", DeltaRuleCase(name="half", read="pre", **ONE), dtype) for dtype in (BF16, FP16)),
    ("kda", KdaCase(name="half", **ONE), BF16),
]
GRADIENTS = [
    ("kda_core", CoreCase(name="core", **GROUP)),
    ("delta_rule", DeltaRuleCase(name="pre", read="pre", **ONE)),
    ("kda", KdaCase(name="scalar", scalar_decay=True, **ONE)),
]
CORE_INPUTS = CoreCase(name="small", B=2, K=3, V=2, **GROUP)


def inputs_of(case: Any, dtype: torch.dtype = F32) -> dict[str, Any]:
    """Return the arguments of a case, on the device under test."""
    return {n: x.to(ops.DEVICE) if isinstance(x, Tensor) else x for n, x in draw(case, dtype).items()}


@pytest.fixture
def only_tokens(monkeypatch) -> None:
    """Make a call fail that cuts its forward into chunks."""
    from kimi_linear.ops.delta_rule.triton import launch

    monkeypatch.setattr(launch, "forward", None)


@pytest.mark.usefixtures("only_tokens")
@pytest.mark.parametrize(
    ("op", "case", "dtype"), CASES, ids=[f"{op}-{case.name}-{str(dtype)[6:]}" for op, case, dtype in CASES]
)
def test_a_short_sequence_matches_the_float64_reference(op, case, dtype) -> None:
    inputs = inputs_of(case, dtype)
    with ops.nan_in_new_memory():
        o, state = call(op, inputs, "triton")
    expected = call(op, ops.in_float64(inputs), "reference")
    assert (o.dtype, state.dtype) == (dtype, F32)
    found = {"o": o, "final_state": state}
    assert errors(found, dict(zip(found, expected, strict=True)), dtype) == {}


@pytest.mark.usefixtures("only_tokens")
@pytest.mark.parametrize(("op", "case"), GRADIENTS, ids=[case.name for _, case in GRADIENTS])
def test_every_gradient_matches_the_float64_reference(op, case) -> None:
    inputs = inputs_of(case)
    with ops.nan_in_new_memory():
        found = run(op, inputs, "triton")
    assert errors(found, reference(op, inputs, found), F32) == {}


def test_lengths_alone_decide(monkeypatch) -> None:
    from kimi_linear.ops.delta_rule.triton import launch, tokens

    assert [tokens.suits(T, None) for T in (0, 1, 32, 33)] == [True, True, True, False]
    assert not tokens.suits(1, torch.tensor([0, 1]))
    ran: list[str] = []
    for module in (tokens, launch):
        chosen = module.forward
        monkeypatch.setattr(
            module, "forward", lambda *x, chosen=chosen, name=module.__name__: ran.append(name) or chosen(*x)
        )
    for T in (33, 2):
        call("delta_rule", inputs_of(DeltaRuleCase(name="x", H=1, T=T)), "triton")
    call("delta_rule", inputs_of(DeltaRuleCase(name="x", H=1, lengths=(2,))), "triton")
    assert [name.rpartition(".")[2] for name in ran] == ["launch", "tokens", "launch"]


@pytest.mark.parametrize("t", [2, 33])
def test_a_walk_goes_on_where_chunks_end_and_the_other_way_round(t) -> None:
    inputs = inputs_of(DeltaRuleCase(name="x", H=1, T=35, gate="slow"))
    whole = call("delta_rule", inputs, "triton")
    names = ("q", "k", "erase_key", "write_value", "log_decay")
    o, state = call("delta_rule", {**inputs, **{n: inputs[n][:, :t] for n in names}}, "triton")
    rest = {**inputs, **{n: inputs[n][:, t:] for n in names}, "initial_state": state}
    o_rest, state = call("delta_rule", rest, "triton")
    assert_close((torch.cat([o, o_rest], 1), state), whole)


def test_a_sequence_has_the_same_bits_alone_and_in_a_batch_and_twice() -> None:
    inputs = inputs_of(CORE_INPUTS, BF16)
    together = call("kda_core", inputs, "triton")
    alone = {
        n: x[:1] if isinstance(x, Tensor) and x.shape[0] == 2 and n[0] not in "Ad" else x for n, x in inputs.items()
    }
    for one, both in zip(call("kda_core", alone, "triton"), together, strict=True):
        assert torch.equal(one, both[:1])
    for one, other in zip(call("kda_core", inputs, "triton"), together, strict=True):
        assert torch.equal(one, other)


def test_later_tokens_change_no_bit_before_them() -> None:
    inputs = inputs_of(CORE_INPUTS)
    o, _ = call("kda_core", inputs, "triton")
    cut = {n: x[:, :2] if n in ("q", "k", "v", "gate", "beta") else x for n, x in inputs.items()}
    assert torch.equal(call("kda_core", cut, "triton")[0], o[:, :2])


def test_narrow_blocks_of_values_agree_with_wide_ones(monkeypatch) -> None:
    from kimi_linear.ops.delta_rule.triton import decode

    inputs = inputs_of(CoreCase(name="x", K=20, V=36, **ONE))
    wide = call("kda_core", inputs, "triton")
    monkeypatch.setattr(decode, "BLOCK", 16)
    assert decode.blocks(20, 36)["BV"] == 16
    assert_close(call("kda_core", inputs, "triton"), wide)


def test_strides_and_neighbours_in_memory_do_not_matter_and_inputs_keep_their_bits() -> None:
    inputs = inputs_of(CORE_INPUTS)
    spread = {n: ops.strided(x) if isinstance(x, Tensor) else x for n, x in inputs.items()}
    before = {n: x.clone() for n, x in spread.items() if isinstance(x, Tensor)}
    for one, other in zip(call("kda_core", spread, "triton"), call("kda_core", inputs, "triton"), strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(spread[n], x) for n, x in before.items())


def test_an_empty_sequence_ends_in_a_copy_of_its_state() -> None:
    inputs = inputs_of(dataclasses.replace(CORE_INPUTS, T=0))
    o, state = call("kda_core", inputs, "triton")
    assert o.shape == (2, 0, 2, 2)
    assert torch.equal(state, inputs["initial_state"])
    assert state.data_ptr() != inputs["initial_state"].data_ptr()


def test_the_operator_passes_opcheck_and_compiles_whole() -> None:
    inputs = inputs_of(dataclasses.replace(CORE_INPUTS, B=1, T=2))
    positional = tuple({**inputs, "scale": 0.5, "allow_neg_eigval": 1.0}.values())
    kinds = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(backend.kda_core_triton, (*ops.requiring_grad(*positional), "inputs"), test_utils=kinds)
    ops.assert_compiles_whole(lambda **x: call("kda_core", x, "triton"), inputs)


def test_a_walk_and_decoding_leave_the_same_bits() -> None:
    """One by one or in one call, the operations are the same; a GPU may add a sum's terms in another order."""
    from kimi_linear.ops import kda_core_decode

    inputs = inputs_of(CORE_INPUTS)
    o, state = call("kda_core", inputs, "triton")
    pool, slots = inputs.pop("initial_state").clone(), torch.arange(2, device=ops.DEVICE)
    del inputs["cu_seqlens"]
    outputs = []
    for t in range(3):
        now = {n: x[:, t] if n in ("q", "k", "v", "gate", "beta") else x for n, x in inputs.items()}
        outputs.append(kda_core_decode(**now, pool=pool, slots=slots, backend="triton"))
    assert_close((torch.stack(outputs, 1), pool), (o, state))
    if ops.DEVICE == "cpu":
        assert torch.equal(torch.stack(outputs, 1), o)
        assert torch.equal(pool, state)
