"""Verification of drafts and replay of what is accepted: every backend against decoding token by token."""

from typing import Any

import pytest
import torch
from torch import Tensor

from contracts.test_delta_rule_decode import pool_of, step
from kimi_linear.base.errors import BackendError, ConfigError, DeviceError, DtypeError, KimiLinearError, ShapeError
from kimi_linear.base.numerics import relative_error, tolerance
from kimi_linear.ops import OPS, Trace, delta_rule_replay
from kimi_linear.ops.delta_rule import pool as pools
from kimi_linear.ops.delta_rule import verify_torch
from kimi_linear.ops.delta_rule.specs import CoreCase, DeltaRuleCase
from support import ops
from support.delta_rule import TOKENS, call
from support.drafts import SHAPE, VERIFY, bits, inputs_of, named, verify

pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]
BACKENDS = ("chunk", "reference", pytest.param("triton", marks=ops.TRITON))
every_backend = pytest.mark.parametrize("backend", BACKENDS)
each_op = pytest.mark.parametrize("op", VERIFY)
WIDER: dict[str, Any] = {"H": 2, "HV": 4}
KINDS: dict[str, Any] = {"delta_rule": DeltaRuleCase, "kda_core": CoreCase}
SLOTS = (7, 0)
CASES = [
    ("delta_rule", DeltaRuleCase(name="vector", **SHAPE)),
    ("delta_rule", DeltaRuleCase(name="scalar", scalar_decay=True, erase="key", **SHAPE)),
    ("delta_rule", DeltaRuleCase(name="pre", read="pre", **SHAPE)),
    ("delta_rule", DeltaRuleCase(name="pre_scalar", read="pre", scalar_decay=True, **SHAPE)),
    ("delta_rule", DeltaRuleCase(name="no_erase", erase="none", **SHAPE)),
    ("delta_rule", DeltaRuleCase(name="no_erase_scalar", erase="none", scalar_decay=True, **SHAPE)),
    ("delta_rule", DeltaRuleCase(name="mixed", gate="mixed", **SHAPE)),
    ("delta_rule", DeltaRuleCase(name="grouped", erase="key", **{**SHAPE, **WIDER, "B": 1})),
    ("kda_core", CoreCase(name="grouped", **{**SHAPE, **WIDER, "B": 1})),
    ("delta_rule", DeltaRuleCase(name="K60_V100", K=60, V=100, H=1, T=2)),
    ("delta_rule", DeltaRuleCase(name="K1_V1_T5", K=1, V=1, T=5, H=1)),
    ("kda_core", CoreCase(name="softplus", **SHAPE)),
    ("kda_core", CoreCase(name="bounded", lower_bound=-5.0, **SHAPE)),
    ("kda_core", CoreCase(name="bounded_no_rate", lower_bound=-5.0, has_rate=False, has_bias=False, **SHAPE)),
    ("kda_core", CoreCase(name="neg_eigval", allow_neg_eigval=True, **SHAPE)),
    ("kda_core", CoreCase(name="extreme", logits=50.0, bias=8.0, rate=4.0, zero_rows=True, **SHAPE)),
    ("kda_core", CoreCase(name="T1", **{**SHAPE, "T": 1})),
]
each_case = pytest.mark.parametrize(("op", "case"), CASES, ids=[f"{op}-{case.name}" for op, case in CASES])
LONGER = [(op, KINDS[op](name=f"T{T}", T=T, B=2)) for op in VERIFY for T in (2, 7, 16, 17, 33)]


def plain(op: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> tuple[dict[str, Any], Tensor]:
    return inputs_of(KINDS[op](name="plain", **{**SHAPE, **sizes}), dtype)


def decoded(
    op: str, inputs: dict[str, Any], pool: Tensor, slots: Tensor, accepted: list[int], backend: str
) -> list[Tensor]:
    """Advance each sequence by its accepted tokens, one by one, in place; return the outputs."""
    outputs = []
    for t in range(inputs["q"].shape[1]):
        now = torch.where(t < torch.tensor(accepted, device=slots.device), slots, -1)
        outputs.append(step(op, inputs, t, pool, now, backend))
    return outputs


def same(one: Tensor, other: Tensor, op: str, backend: str) -> bool:
    """Return whether two results agree: bit for bit where that is promised and the order of a sum is known.

    The reference of `kda_core` forms gates by torch's functions, which treat the end of a tensor in another way.
    """
    exact = backend == "triton" or (op, backend) == ("delta_rule", "reference")
    if exact and ops.DEVICE == "cpu":
        return torch.equal(bits(one), bits(other))
    return relative_error(one, other) <= tolerance(one.dtype).output


def assert_draft(op: str, case: Any, dtype: torch.dtype, backend: str) -> None:
    """Outputs are those of the whole prompt; what is replayed is what decoding leaves; nothing else changes."""
    inputs, state = inputs_of(case, dtype)
    wide = ops.in_float64({**inputs, "initial_state": state})
    expected, _ = call(op, {**wide, "cu_seqlens": None}, "reference")
    slots, accepted = named(*SLOTS[: case.B]), [case.T, case.T // 2][: case.B]
    pool = pool_of(state, slots)
    before, after = pool.clone(), pool.clone()
    with ops.nan_in_new_memory():
        o, trace = verify(op, inputs, pool, slots, backend)
    assert torch.equal(bits(pool), bits(before))
    assert o.dtype == dtype
    assert relative_error(o, expected) <= tolerance(dtype).output
    outputs = torch.stack(decoded(op, inputs, after, slots, accepted, backend), 1)
    assert same(o[0], outputs[0], op, backend)
    with ops.nan_in_new_memory():
        delta_rule_replay(trace, named(*accepted), pool, slots, backend=backend)
    for n, slot in enumerate(slots.tolist()):
        assert same(pool[slot], after[slot], op, backend), n
    others = [s for s in range(len(pool)) if s not in slots.tolist()]
    assert torch.equal(pool[others], before[others])


@every_backend
@each_case
def test_a_draft_is_verified_and_replayed_as_it_is_decoded(op, case, backend) -> None:
    assert_draft(op, case, torch.float32, backend)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_op
def test_half_precision_drafts(op, dtype, backend) -> None:
    assert_draft(op, KINDS[op](name="half", K=20, V=20, T=2, H=1, B=2), dtype, backend)


@pytest.mark.parametrize("backend", ["chunk", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("op", "case"), LONGER, ids=[f"{op}-{case.name}" for op, case in LONGER])
def test_drafts_of_every_length(op, case, dtype, backend) -> None:
    assert_draft(op, case, dtype, backend)


@every_backend
@each_op
def test_speculation_goes_on_as_if_nothing_had_been_rejected(op, backend) -> None:
    """Drafts of three tokens of which two, none, three and one are right; wrong ones are other tokens."""
    inputs, state = plain(op, T=9, B=1)
    expected, final = call(op, {**inputs, "initial_state": state, "cu_seqlens": None}, "reference")
    wrong, _ = inputs_of(KINDS[op](name="wrong", **{**SHAPE, "B": 1}))
    pool, slots, at, outputs = pool_of(state, named(3)), named(3), 0, []
    for right in (2, 0, 3, 1, 3):
        draft = dict(inputs)
        for name in TOKENS[op]:
            truth = inputs[name][:, at : at + right]
            draft[name] = torch.cat([truth, -wrong[name].abs()[:, right:]], 1)
        o, trace = verify(op, draft, pool, slots, backend)
        delta_rule_replay(trace, named(right), pool, slots, backend=backend)
        outputs.append(o[:, :right])
        at += right
    ops.assert_close(torch.cat(outputs, 1), expected)
    ops.assert_close(pool[3:4], final)


@every_backend
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accepting_nothing_keeps_every_bit(dtype, backend) -> None:
    """A zero's sign and a NaN's payload too."""
    inputs, _ = plain("delta_rule")
    pool, slots = torch.full((9, 2, 8, 6), -0.0, device=ops.DEVICE).to(dtype), named(*SLOTS)
    pool[:, 0, :4] = torch.inf
    bits(pool[:, 1, :4]).fill_(0x7FA1 if dtype == torch.bfloat16 else 0x7FA00001)
    before = pool.clone()
    _, trace = verify("delta_rule", inputs, pool, slots, backend)
    assert torch.equal(bits(pool), bits(before))
    delta_rule_replay(trace, named(0, 0), pool, slots, backend=backend)
    assert torch.equal(bits(pool), bits(before))


@every_backend
def test_rejected_tokens_are_not_looked_at(backend) -> None:
    inputs, state = plain("kda_core")
    slots = named(*SLOTS)
    pool, other = pool_of(state, slots), pool_of(state, slots)
    _, trace = verify("kda_core", inputs, pool, slots, backend)
    delta_rule_replay(trace, named(1, 2), pool, slots, backend=backend)
    for x in trace:
        x[0, 1:], x[1, 2:] = torch.nan, torch.inf
    delta_rule_replay(trace, named(1, 2), other, slots, backend=backend)
    assert torch.equal(pool, other)


@every_backend
@each_op
def test_what_a_token_writes_does_not_depend_on_what_follows(op, backend) -> None:
    inputs, state = plain(op)
    slots = named(*SLOTS)
    pool = pool_of(state, slots)
    o, trace = verify(op, inputs, pool, slots, backend)
    for name in TOKENS[op]:
        inputs[name] = torch.cat([inputs[name][:, :2], inputs[name][:, :1]], 1)
    o_other, other = verify(op, inputs, pool, slots, backend)
    for one, two in zip((o, *trace), (o_other, *other), strict=True):
        assert same(one[:, :2], two[:, :2], op, backend)


@every_backend
@each_op
def test_slot_minus_one_is_skipped(op, backend) -> None:
    inputs, state = plain(op, B=3)
    slots, skipping = named(7, 0, 3), named(7, -1, 3)
    pool, whole = pool_of(state, slots), pool_of(state, slots)
    before = pool.clone()
    o, trace = verify(op, inputs, whole, slots, backend)
    with ops.nan_in_new_memory():
        found, found_trace = verify(op, inputs, pool, skipping, backend)
    for one, other in zip((found, *found_trace), (o, *trace), strict=True):
        assert torch.equal(one[[0, 2]], other[[0, 2]])
        assert torch.equal(one[1], torch.zeros_like(one[1]))
    delta_rule_replay(trace, named(2, 2, 3), whole, slots, backend=backend)
    delta_rule_replay(trace, named(2, 2, 3), pool, skipping, backend=backend)
    assert torch.equal(pool[[7, 3]], whole[[7, 3]])
    assert torch.equal(pool[0], before[0])


@every_backend
@pytest.mark.parametrize("sizes", [{"B": 0}, {"T": 0}, {}], ids=["no_sequence", "no_token", "no_slot"])
def test_nothing_to_do(sizes, backend) -> None:
    inputs, _ = plain("kda_core", **sizes)
    N, T = inputs["q"].shape[:2]
    pool = torch.ones(3, 2, 8, 6, device=ops.DEVICE)
    slots = torch.full((N,), -1, device=ops.DEVICE)
    o, trace = verify("kda_core", inputs, pool, slots, backend)
    assert torch.equal(o, torch.zeros(N, T, 2, 6, device=ops.DEVICE))
    assert [x.shape for x in trace] == [(N, T, 2, 8), (N, T, 1, 8), (N, T, 2, 6)]
    assert not any(x.any() for x in trace)
    delta_rule_replay(trace, torch.full_like(slots, T), pool, slots, backend=backend)
    assert torch.equal(pool, torch.ones_like(pool))


@every_backend
def test_consecutive_slots_and_both_integers_equal_scattered_ones(backend) -> None:
    inputs, state = plain("kda_core")
    found = []
    for dtype, where in ((torch.int32, (2, 3)), (torch.int64, SLOTS)):
        slots = named(*where).to(dtype)
        pool = pool_of(state, slots)
        o, trace = verify("kda_core", inputs, pool, slots, backend)
        delta_rule_replay(trace, named(3, 1).to(dtype), pool, slots, backend=backend)
        found.append((o, *trace, pool[slots.long()]))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@every_backend
@each_op
def test_a_pool_may_be_a_slice_of_a_larger_one(op, backend) -> None:
    inputs, state = plain(op)
    for slots in (named(*SLOTS), named(4, 5)):
        dense = pool_of(state, slots)
        layers = torch.full((9, 2, 2, 6, 8), 1e30, device=ops.DEVICE)
        pool = layers[:, 1].transpose(2, 3).copy_(dense)
        o, trace = verify(op, inputs, dense, slots, backend)
        o_slice, trace_slice = verify(op, inputs, pool, slots, backend)
        torch.testing.assert_close((o_slice, *trace_slice), (o, *trace))
        for each in (dense, pool):
            delta_rule_replay(trace, named(3, 2), each, slots, backend=backend)
        torch.testing.assert_close(layers[:, 1].transpose(2, 3), dense)
        assert (layers[:, 0] == 1e30).all()


@every_backend
@each_op
def test_inputs_are_left_as_they_were_whatever_their_strides(op, backend) -> None:
    inputs, state = plain(op)
    slots, accepted = named(*SLOTS), named(2, 3)
    pool, other = pool_of(state, slots), pool_of(state, slots)
    spread = {n: ops.strided(x) if isinstance(x, Tensor) else x for n, x in inputs.items()}
    before = {n: x.clone() for n, x in spread.items() if isinstance(x, Tensor)}
    o, trace = verify(op, inputs, pool, slots, backend)
    results = verify(op, spread, pool, ops.strided(slots), backend)
    torch.testing.assert_close((results[0], *results[1]), (o, *trace))
    owned = {x.untyped_storage().data_ptr() for x in (*before.values(), pool)}
    assert all(x.untyped_storage().data_ptr() not in owned for x in (o, *trace))
    kept = [x.clone() for x in trace]
    delta_rule_replay(trace, accepted, pool, slots, backend=backend)
    loose = Trace(*(ops.strided(x) for x in trace))
    delta_rule_replay(loose, ops.strided(accepted), other, ops.strided(slots), backend=backend)
    assert torch.equal(pool, other)
    assert all(torch.equal(spread[n], x) for n, x in before.items())
    assert all(torch.equal(x, y) for x, y in zip(trace, kept, strict=True))


@pytest.fixture
def unread(monkeypatch) -> None:
    """Make the host read nothing, as on a GPU: any look at a tensor's values fails."""

    def fail(*_: Any) -> None:
        raise AssertionError("the host reads a tensor")

    monkeypatch.setattr(pools, "unread", lambda x: True)
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, fail)


@pytest.mark.parametrize("backend", ["chunk", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [(7, 0, 3), (-1, 7, 3), (0, 9, -1), (-1, 9, -1)])
def test_nothing_is_read_on_the_host_where_it_would_wait(slots, dtype, backend, request) -> None:
    """A slot outside of the pool is skipped there."""
    inputs, state = plain("kda_core", B=3)
    pool = pool_of(state, named(7, 0, 3)).to(dtype)
    unread, given, accepted = pool.clone(), named(*slots), named(3, 1, 2)
    good = torch.where(given < len(pool), given, -1)
    o, trace = verify("kda_core", inputs, pool, good, backend)
    delta_rule_replay(trace, accepted, pool, good, backend=backend)
    o_one = step("kda_core", inputs, 0, one := pool.clone(), good, backend)
    request.getfixturevalue("unread")
    found, found_trace = verify("kda_core", inputs, unread, given, backend)
    delta_rule_replay(found_trace, accepted, unread, given, backend=backend)
    found_one = step("kda_core", inputs, 0, decoded_unread := unread.clone(), given, backend)
    request.getfixturevalue("monkeypatch").undo()
    torch.testing.assert_close((found, *found_trace, found_one), (o, *trace, o_one))
    torch.testing.assert_close((unread, decoded_unread), (pool, one))
    outside = [s for s in range(len(pool)) if s not in good.tolist()]
    for x in (unread, decoded_unread):
        assert torch.equal(x[outside], pool_of(state, named(7, 0, 3)).to(dtype)[outside])


@pytest.mark.parametrize("backend", ["chunk", "reference"])
def test_more_or_less_than_all_tokens_mean_all_or_none_where_nothing_is_read(backend, request) -> None:
    inputs, state = plain("kda_core")
    slots = named(*SLOTS)
    pool, other = pool_of(state, slots), pool_of(state, slots)
    _, trace = verify("kda_core", inputs, pool, slots, backend)
    delta_rule_replay(trace, named(3, 0), pool, slots, backend=backend)
    request.getfixturevalue("unread")
    delta_rule_replay(trace, named(5, -2), other, slots, backend=backend)
    request.getfixturevalue("monkeypatch").undo()
    assert torch.equal(pool, other)


@ops.TRITON
def test_the_kernels_skip_slots_outside_of_the_pool_and_bound_what_is_accepted() -> None:
    from kimi_linear.ops.delta_rule.triton import tokens
    from kimi_linear.ops.delta_rule.triton.backend import plain_inputs

    x, state = plain("delta_rule", B=3)
    slots = named(3, 2**31, 1)
    pool = pool_of(state[2:], named(1), size=3, fill=1.0)
    given = [x[n] for n in ("q", "k", "erase_key", "write_value", "log_decay")]
    inputs = plain_inputs(*given, None, 1.0, None, "post")
    o, *trace = (y.unflatten(0, (3, 3)) for y in tokens.verify(inputs, pool, slots, 3))
    for y in (o, *trace):
        assert not y[:2].any()
        assert y[2].any()
    more, less = pool.clone(), pool.clone()
    tokens.replay(*trace, named(3, 3, 2**33), more, slots)
    tokens.replay(*trace, named(3, 3, 1 - 2**32), less, slots)
    assert torch.equal(less, pool)
    delta_rule_replay(Trace(*(y[2:] for y in trace)), named(3), pool, named(1), backend="triton")
    assert torch.equal(more, pool)


def test_a_trace_has_the_bytes_the_docs_say() -> None:
    inputs, state = plain("kda_core", T=2, B=1, H=2, HV=2, K=128, V=128)
    _, trace = verify("kda_core", inputs, pool_of(state, named(0), size=1), named(0), "chunk")
    assert sum(x.numel() * x.element_size() for x in trace) == 2 * 2 * 1536
    assert all(x.dtype == torch.float32 and x.is_contiguous() for x in trace)


@each_op
def test_the_key_of_a_trace_is_the_one_written(op) -> None:
    inputs, state = plain(op)
    slots = named(*SLOTS)
    _, trace = verify(op, inputs, pool_of(state, slots), slots, "chunk")
    expected = torch.nn.functional.normalize(inputs["k"], dim=-1) if op == "kda_core" else inputs["k"]
    torch.testing.assert_close(trace.key, expected)


@pytest.mark.parametrize("op", ["delta_rule_verify", "kda_core_verify", "delta_rule_replay"])
def test_backends_and_their_order(op) -> None:
    assert [b.name for b in OPS[op].backends] == ["triton", "chunk", "reference"]


def test_a_call_without_a_backend_runs_the_chunk() -> None:
    inputs, state = plain("kda_core")
    slots = torch.arange(2)
    pool = state.cpu().clone()
    cpu = {n: x.cpu() if isinstance(x, Tensor) else x for n, x in inputs.items()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _, trace = verify("kda_core", cpu, pool, slots, None)
        delta_rule_replay(trace, torch.tensor([1, 2]), pool, slots)
    ran = {event.key for event in profile.events() if event.key.startswith("kimi_linear::")}
    assert ran == {"kimi_linear::kda_core_verify_chunk", "kimi_linear::delta_rule_replay_chunk"}


@every_backend
@each_op
def test_a_call_that_needs_a_gradient_is_refused(op, backend) -> None:
    inputs, state = plain(op)
    slots = named(*SLOTS)
    pool = pool_of(state, slots)
    inputs["k"].requires_grad_()
    with pytest.raises(BackendError, match=r"verifies a draft, which has no gradient; use the many-token call"):
        verify(op, inputs, pool, slots, backend)
    with torch.no_grad():
        _, trace = verify(op, inputs, pool, slots, backend)
    with pytest.raises(BackendError, match=r"in place, so it has no gradient"):
        delta_rule_replay(trace, named(1, 1), pool.requires_grad_(), slots, backend=backend)


@every_backend
@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ((0, 9), r"slots holds 9, expected -1 \(skip\) or a slot of the pool, 0 to 8"),
        ((0, -2), r"slots holds -2"),
        ((3, 3), r"slots names slot 3 twice"),
    ],
)
@pytest.mark.skipif(ops.DEVICE != "cpu", reason="a GPU's slots are not looked at")
def test_bad_slots_are_refused_before_anything_changes(slots, message, backend) -> None:
    inputs, state = plain("kda_core")
    pool = pool_of(state, named(*SLOTS))
    _, trace = verify("kda_core", inputs, pool, named(*SLOTS), backend)
    before = pool.clone()
    with pytest.raises(ShapeError, match=message):
        verify("kda_core", inputs, pool, named(*slots), backend)
    with pytest.raises(ShapeError, match=message):
        delta_rule_replay(trace, named(1, 1), pool, named(*slots), backend=backend)
    for accepted in ((1, 4), (-1, 1)):
        with pytest.raises(ShapeError, match=r"accepted holds (4|-1), expected 0 to 3, the tokens of the trace"):
            delta_rule_replay(trace, named(*accepted), pool, named(*SLOTS), backend=backend)
    assert torch.equal(pool, before)


class TestErrors:
    """One sentence that names the argument, what it is and what it should be."""

    def refused(self, op: str, error: type[Exception], message: str, **changes: Any) -> None:
        inputs, state = plain(op, **WIDER)
        given = {**inputs, "pool": state.clone(), "slots": named(0, 1), **changes}
        with pytest.raises(error, match=f"^{op}_verify: {message}"):
            VERIFY[op](**given)

    @each_op
    def test_arguments_of_a_verification(self, op) -> None:
        x, state = plain(op, **WIDER)
        value = "v" if op == "kda_core" else "write_value"
        self.refused(op, ShapeError, r"k is \[2, 2, 2, 8\], expected \[2, 3, 2, 8\] \(N, T, H, K\)", k=x["k"][:, :2])
        self.refused(op, ShapeError, rf"{value} is \[2, 3, 24\], expected", **{value: x[value].flatten(2)})
        self.refused(op, ShapeError, r"HV is 3 and H is 2", **{value: x[value][:, :, :3]})
        self.refused(op, ShapeError, r"pool is \[2, 4, 6, 8\], expected \[any, 4, 8, 6\]", pool=state.mT)
        self.refused(op, ShapeError, r"slots is \[3\], expected \[2\] \(N\)", slots=named(0, 1, -1))
        self.refused(op, DtypeError, r"slots is torch.float32", slots=named(0, 1).float())
        self.refused(op, DtypeError, r"pool is torch.float64, expected torch.float32 or torch.bf", pool=state.double())
        self.refused(op, DeviceError, r"pool is on meta", pool=state.to("meta"))

    def test_arguments_of_one_of_them(self) -> None:
        x, _ = plain("delta_rule", **WIDER)
        self.refused("delta_rule", ConfigError, r"read is 'before'", read="before")
        self.refused("delta_rule", ShapeError, r"log_decay is \[2, 3, 2\]", log_decay=x["log_decay"][:, :, :2, 0])
        self.refused("kda_core", ConfigError, r"A_log is None, expected \[HV\]", A_log=None)
        self.refused("kda_core", ConfigError, r"lower_bound is 1.0, expected a negative", lower_bound=1.0)

    def test_a_positive_log_decay_under_debug(self, monkeypatch) -> None:
        monkeypatch.setenv("KIMI_LINEAR_DEBUG", "1")
        bad = torch.full((2, 3, 4), 0.5, device=ops.DEVICE)
        self.refused("delta_rule", KimiLinearError, r"log_decay holds 0.5, expected natural", log_decay=bad)

    def test_arguments_of_a_replay(self) -> None:
        inputs, state = plain("delta_rule", **WIDER)
        slots = named(0, 1)
        _, trace = verify("delta_rule", inputs, state, slots, "chunk")

        def refused(error: type[Exception], message: str, **changes: Any) -> None:
            parts = {name: changes.pop(name) for name in Trace._fields if name in changes}
            given = {"accepted": named(1, 1), "pool": state.clone(), "slots": slots, **changes}
            with pytest.raises(error, match=f"^delta_rule_replay: {message}"):
                delta_rule_replay(trace._replace(**parts), **given)

        refused(ShapeError, r"trace.key is \[2, 3, 16\], expected", key=trace.key.flatten(2))
        refused(
            ShapeError, r"trace.written is \[2, 2, 4, 6\], expected \[2, 3, any, any\]", written=trace.written[:, :2]
        )
        refused(ShapeError, r"trace.decay is \[2, 3, 4, 7\], expected \[2, 3, 4, 8\]", decay=trace.decay[..., :7])
        refused(ShapeError, r"HV is 3 and H is 2", written=trace.written[:, :, :3])
        refused(DtypeError, r"trace.decay is torch.float64, expected torch.float32", decay=trace.decay.double())
        refused(DtypeError, r"trace.key is torch.bfloat16", key=trace.key.bfloat16())
        refused(ShapeError, r"accepted is \[1\], expected \[2\] \(N\)", accepted=named(1))
        refused(DtypeError, r"accepted is torch.float32", accepted=named(1, 1).float())
        refused(DeviceError, r"accepted is on meta", accepted=named(1, 1).to("meta"))
        refused(DeviceError, r"trace.written is on meta", written=trace.written.to("meta"))
        refused(ShapeError, r"pool is \[2, 4, 8, 5\], expected \[any, 4, 8, 6\]", pool=state[..., :5])
        refused(DtypeError, r"pool is torch.float16", pool=state.half())


def positional(op: str, **sizes: Any) -> tuple[Any, ...]:
    """Return the arguments of a verification's custom operator."""
    x, state = plain(op, T=2, K=3, V=2, **sizes)
    settings = [x.pop("scale") or 0.5]
    if op == "kda_core":
        settings = [x.pop("lower_bound"), 1.0 + x.pop("allow_neg_eigval"), *settings]
    else:
        settings.append(x.pop("read"))
    return (*x.values(), pool_of(state, named(2, 0), size=3), named(2, 0), *settings)


def opcheck(operator: Any, *arguments: Any) -> None:
    """Run torch's checks but the one that compiles, which is made below."""
    kinds = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, arguments, test_utils=kinds)


@every_backend
def test_the_operators_pass_opcheck(backend) -> None:
    from kimi_linear.ops.delta_rule.triton import verify as kernels

    module = kernels if backend == "triton" else verify_torch
    verify_plain = getattr(module, f"delta_rule_verify_{backend}")
    opcheck(verify_plain, *positional("delta_rule"))
    if backend != "reference":
        opcheck(getattr(module, f"kda_core_verify_{backend}"), *positional("kda_core"))
    *_, pool, slots, _, _ = arguments = positional("delta_rule")
    _, *trace = verify_plain(*arguments)
    opcheck(getattr(module, f"delta_rule_replay_{backend}"), *trace, named(1, 2), pool, slots)


@every_backend
@each_op
def test_a_cycle_compiles_whole(op, backend) -> None:
    torch.compiler.reset()
    inputs, state = plain(op, T=2, K=3, V=2, HV=1)
    slots, accepted = named(*SLOTS), named(1, 2)

    def cycle(pool: Tensor) -> tuple[Tensor, Trace]:
        o, trace = verify(op, inputs, pool, slots, backend)
        delta_rule_replay(trace, accepted, pool, slots, backend=backend)
        return o, trace

    eager, compiled = pool_of(state, slots), pool_of(state, slots)
    expected = cycle(eager)
    found = torch.compile(cycle, fullgraph=True, backend="aot_eager")(compiled)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert torch.equal(compiled, eager)
