"""Every backend of the one-token operators: a pool of states, updated in place, equals the many-token call."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_linear.base.errors import BackendError, ShapeError
from kimi_linear.base.numerics import relative_error, tolerance
from kimi_linear.ops import delta_rule_decode, kda_core_decode
from kimi_linear.ops.delta_rule.specs import CoreCase, DeltaRuleCase
from support import ops
from support.delta_rule import KINDS, PARAMETERS, TOKENS, call, draw

DECODE = {"delta_rule": delta_rule_decode, "kda_core": kda_core_decode}
BACKENDS = [(op, backend) for op in DECODE for backend in ops.backends(f"{op}_decode")]
every_backend = pytest.mark.parametrize(("op", "backend"), BACKENDS)
SHAPE: dict[str, Any] = {"T": 6, "B": 4, "HV": 4}
PLAIN = {op: kind(name="plain", **SHAPE) for op, kind in KINDS.items()}
CASES = [
    ("delta_rule", DeltaRuleCase(name="vector", **SHAPE)),
    ("delta_rule", DeltaRuleCase(name="scalar", scalar_decay=True, erase="key", **SHAPE)),
    ("delta_rule", DeltaRuleCase(name="pre", read="pre", **SHAPE)),
    ("delta_rule", DeltaRuleCase(name="pre_scalar", read="pre", scalar_decay=True, **SHAPE)),
    ("delta_rule", DeltaRuleCase(name="no_erase", erase="none", **SHAPE)),
    ("delta_rule", DeltaRuleCase(name="mixed", gate="mixed", **SHAPE)),
    ("delta_rule", DeltaRuleCase(name="K60_V100", K=60, V=100, T=4, B=2)),
    ("delta_rule", DeltaRuleCase(name="K1_V1", K=1, V=1, T=4, B=2)),
    ("kda_core", CoreCase(name="softplus", **SHAPE)),
    ("kda_core", CoreCase(name="bounded", lower_bound=-5.0, **SHAPE)),
    ("kda_core", CoreCase(name="bounded_no_rate", lower_bound=-5.0, has_rate=False, has_bias=False, **SHAPE)),
    ("kda_core", CoreCase(name="neg_eigval", allow_neg_eigval=True, **SHAPE)),
    ("kda_core", CoreCase(name="extreme", logits=50.0, bias=8.0, rate=4.0, zero_rows=True, **SHAPE)),
]
CASES_BY_BACKEND = [
    pytest.param(op, backend, case, dtype, id=f"{op}-{backend}-{case.name}-{dtype}")
    for op, case in CASES
    for backend, dtype in ops.backend_dtypes(f"{op}_decode")
]


def step(op: str, inputs: dict[str, Any], t: int, pool: Tensor, slots: Tensor, backend: str | None = None) -> Tensor:
    """Advance every sequence by token t of a dense batch."""
    now = {n: None if inputs[n] is None else inputs[n][:, t] for n in TOKENS[op]}
    others = {n: x for n, x in inputs.items() if n not in (*TOKENS[op], "initial_state", "cu_seqlens")}
    return DECODE[op](**now, **others, pool=pool, slots=slots.to(ops.DEVICE), backend=backend)


def pool_of(state: Tensor, slots: Tensor, size: int = 9, fill: float = 1e30) -> Tensor:
    """Return a pool that holds the states at their slots and `fill` elsewhere."""
    pool = state.new_full((size, *state.shape[1:]), fill)
    pool[slots.long()] = state
    return pool


SLOTS = torch.tensor([7, 0, 3, 4])


@pytest.mark.parametrize(("op", "backend", "case", "dtype"), CASES_BY_BACKEND)
def test_tokens_one_by_one_equal_the_whole_prompt(op, backend, case, dtype) -> None:
    inputs = draw(case, dtype)
    o, state = call(op, ops.in_float64(inputs), "reference")
    slots = SLOTS[: case.B]
    pool = pool_of(inputs["initial_state"], slots)
    outputs = [step(op, inputs, t, pool, slots, backend) for t in range(case.T)]
    limit = tolerance(dtype).output
    assert all(x.dtype == dtype for x in outputs)
    assert relative_error(torch.stack(outputs, 1), o) <= limit
    assert relative_error(pool[slots], state) <= limit


@every_backend
def test_states_of_other_slots_stay_bit_identical(op, backend) -> None:
    inputs = draw(PLAIN[op])
    pool = pool_of(inputs["initial_state"], SLOTS)
    pool[1] = float("nan")
    before = pool.clone()
    step(op, inputs, 0, pool, SLOTS, backend)
    others = [s for s in range(len(pool)) if s not in SLOTS.tolist()]
    assert torch.equal(pool[others].view(torch.int32), before[others].view(torch.int32))
    assert pool[SLOTS].isfinite().all()


@every_backend
def test_slot_minus_one_is_skipped(op, backend) -> None:
    inputs = draw(PLAIN[op])
    pool = pool_of(inputs["initial_state"], SLOTS)
    all_rows = pool.clone()
    o = step(op, inputs, 0, all_rows, SLOTS, backend)
    skipping = SLOTS.clone()
    skipping[1] = -1
    found = step(op, inputs, 0, pool, skipping, backend)
    kept = [0, 2, 3]
    assert torch.equal(found[kept], o[kept])
    assert torch.equal(found[1], torch.zeros_like(found[1]))
    assert torch.equal(pool[SLOTS[kept]], all_rows[SLOTS[kept]])
    assert torch.equal(pool[SLOTS[1]], inputs["initial_state"][1])


@every_backend
def test_minus_one_before_slot_zero_is_no_run_of_slots(op, backend) -> None:
    inputs = draw(PLAIN[op])
    slots = torch.tensor([-1, 0, 1, 2])
    pool, scattered = (pool_of(inputs["initial_state"][1:], where) for where in (slots[1:], SLOTS[1:]))
    o = step(op, inputs, 0, pool, slots, backend)
    expected = step(op, inputs, 0, scattered, torch.cat([slots[:1], SLOTS[1:]]), backend)
    assert torch.equal(o, expected)
    assert torch.equal(pool[:3], scattered[SLOTS[1:]])
    assert (pool[3:] == 1e30).all()


@every_backend
@pytest.mark.parametrize("rows", [0, 4])
def test_nothing_to_do(op, backend, rows) -> None:
    """No sequences at all, or none of them on a slot."""
    inputs = draw(PLAIN[op])
    inputs = {**inputs, **{n: inputs[n][:rows] for n in TOKENS[op]}}
    pool = torch.ones(3, 4, 8, 6, device=ops.DEVICE)
    o = step(op, inputs, 0, pool, torch.full((rows,), -1), backend)
    assert torch.equal(o, torch.zeros(rows, 4, 6, device=ops.DEVICE))
    assert torch.equal(pool, torch.ones_like(pool))


@every_backend
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_consecutive_slots_equal_scattered_ones(op, backend, dtype) -> None:
    inputs = draw(PLAIN[op])
    consecutive = torch.tensor([2, 3, 4, 5], dtype=dtype)
    pool, other = (pool_of(inputs["initial_state"], slots) for slots in (consecutive, SLOTS))
    o, o_other = (step(op, inputs, 0, p, s, backend) for p, s in ((pool, consecutive), (other, SLOTS)))
    assert torch.equal(o, o_other)
    assert torch.equal(pool[2:6], other[SLOTS])


@every_backend
def test_a_sequence_does_not_depend_on_its_batch(op, backend) -> None:
    inputs = draw(KINDS[op](name="rows", T=1, B=4, K=5, V=3))
    pool = pool_of(inputs["initial_state"], SLOTS)
    o = step(op, inputs, 0, pool, SLOTS, backend)
    for n in range(4):
        alone = {**inputs, **{name: inputs[name][n : n + 1] for name in TOKENS[op]}}
        own = pool_of(inputs["initial_state"], SLOTS)
        o_alone = step(op, alone, 0, own, SLOTS[n : n + 1], backend)
        if backend == "reference":
            # Made of torch's functions, some of which treat the end of a tensor in another way than the rest.
            torch.testing.assert_close(o_alone[0], o[n], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(o_alone[0], o[n])
            assert torch.equal(own[SLOTS[n]], pool[SLOTS[n]])


@every_backend
def test_a_pool_may_be_a_slice_of_a_larger_one(op, backend) -> None:
    inputs = draw(PLAIN[op])
    plain = pool_of(inputs["initial_state"], SLOTS)
    layers = torch.full((9, 2, 4, 6, 8), 1e30, device=ops.DEVICE)
    pool = layers[:, 1].transpose(2, 3).copy_(plain)
    o = step(op, inputs, 0, plain, SLOTS, backend)
    torch.testing.assert_close(step(op, inputs, 0, pool, SLOTS, backend), o)
    torch.testing.assert_close(layers[:, 1].transpose(2, 3), plain)
    assert (layers[:, 0] == 1e30).all()


@every_backend
def test_inputs_are_left_as_they_were(op, backend) -> None:
    inputs = draw(PLAIN[op])
    before = {n: x.clone() for n, x in inputs.items() if isinstance(x, Tensor)}
    pool, slots = pool_of(inputs["initial_state"], SLOTS), SLOTS.clone().to(ops.DEVICE)
    o = step(op, inputs, 0, pool, slots, backend)
    assert all(torch.equal(inputs[n], x) for n, x in before.items())
    assert torch.equal(slots.cpu(), SLOTS)
    given = {x.untyped_storage().data_ptr() for x in (*before.values(), pool)}
    assert o.untyped_storage().data_ptr() not in given


@every_backend
def test_the_callers_autocast_changes_nothing(op, backend) -> None:
    inputs = draw(PLAIN[op])
    for slots in (SLOTS, torch.arange(4)):
        plain, inside = (pool_of(inputs["initial_state"], slots) for _ in range(2))
        o = step(op, inputs, 0, plain, slots, backend)
        with torch.autocast(ops.DEVICE, dtype=torch.bfloat16):
            assert torch.equal(step(op, inputs, 0, inside, slots, backend), o)
        assert torch.equal(plain, inside)


@every_backend
def test_a_call_that_needs_a_gradient_is_refused(op, backend) -> None:
    inputs = draw(PLAIN[op])
    for name in (*TOKENS[op], *PARAMETERS[op], "pool"):
        pool = pool_of(inputs["initial_state"], SLOTS)
        leaf = (pool if name == "pool" else inputs[name].clone()).requires_grad_()
        wanting = inputs if name == "pool" else {**inputs, name: leaf}
        with pytest.raises(BackendError, match=r"in place, so it has no gradient; use the many-token call"):
            step(op, wanting, 0, pool, SLOTS, backend)
        with torch.no_grad():
            step(op, wanting, 0, pool, SLOTS, backend)


# On a GPU a look at the slots would wait for it, and one outside of the pool is skipped.
@ops.CPU
@every_backend
@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([0, 1, 2, 9], r"slots holds 9, expected -1 \(skip\) or a slot of the pool, 0 to 8"),
        ([0, -2, 1, 2], r"slots holds -2, expected -1"),
        ([3, -1, 3, -1], r"slots names slot 3 twice"),
    ],
)
def test_bad_slots_are_refused_before_anything_changes(op, backend, slots, message) -> None:
    inputs = draw(PLAIN[op])
    pool = torch.ones(9, 4, 8, 6)
    with pytest.raises(ShapeError, match=message):
        step(op, inputs, 0, pool, torch.tensor(slots), backend)
    assert torch.equal(pool, torch.ones_like(pool))
