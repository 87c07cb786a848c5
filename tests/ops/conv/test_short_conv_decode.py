from typing import Any

import pytest
import torch

from kimi_linear.base.errors import BackendError, DtypeError, ShapeError
from kimi_linear.base.numerics import relative_error, tolerance
from kimi_linear.ops import short_conv, short_conv_decode
from kimi_linear.ops.conv.cpu import short_conv_decode_cpu
from kimi_linear.ops.conv.decode import short_conv_decode_reference
from kimi_linear.ops.conv.specs import ConvSpec
from support import ops

EACH_BACKEND = pytest.mark.parametrize("backend", ops.backends("short_conv_decode"))
EACH_DTYPE = pytest.mark.parametrize(("backend", "dtype"), ops.backend_dtypes("short_conv_decode"))
# Slots out of order, and in order without a gap, which is a path of its own.
EACH_SLOTS = pytest.mark.parametrize("slots", [[4, 0, 2], [1, 2, 3], [-1, 3, -1], [3, -1, 0], [-1, -1, -1]], ids=str)


def step(spec: ConvSpec, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x [B, D], weight [D, W] and histories [B, D, W - 1] of a one-token call."""
    inputs = spec.inputs(dtype)
    return inputs["x"][:, 0], inputs["weight"], inputs["initial_state"]


def filled_pool(like: torch.Tensor) -> torch.Tensor:
    return torch.full((5, *like.shape[1:]), 1e4, dtype=like.dtype)


@EACH_SLOTS
@EACH_DTYPE
@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_step_equals_the_many_token_call_and_touches_only_its_slots(
    width: int, backend: str, dtype: torch.dtype, slots: list[int]
) -> None:
    x, weight, history = step(ConvSpec("step", T=1, B=3, W=width), dtype)
    pool = filled_pool(history)
    for row, slot in enumerate(slots):
        if slot >= 0:
            pool[slot] = history[row]
    expected_pool = pool.clone()
    wide = [t.double() for t in (x.unsqueeze(1), weight, history)]
    expected, state = short_conv(wide[0], wide[1], initial_state=wide[2], backend="reference")
    y = short_conv_decode(x, weight, pool, torch.tensor(slots), backend=backend)
    for row, slot in enumerate(slots):
        if slot < 0:
            assert y[row].abs().max() == 0
        else:
            assert relative_error(y[row], expected[row, 0]) <= tolerance(dtype).output
            expected_pool[slot] = state[row].to(dtype)
    assert torch.equal(pool, expected_pool)


@EACH_BACKEND
def test_token_by_token_equals_the_whole(backend: str) -> None:
    inputs = ConvSpec("whole", B=2, T=9, initial_state=False).inputs(torch.float32)
    y, state = short_conv(**inputs)
    pool = torch.zeros(2, 6, 3)
    slots = torch.tensor([1, 0])
    for t in range(9):
        ops.assert_close(short_conv_decode(inputs["x"][:, t], inputs["weight"], pool, slots, backend=backend), y[:, t])
    assert torch.equal(pool[slots], state)


@EACH_BACKEND
def test_the_pool_keeps_its_dtype_and_its_strides_do_not_matter(backend: str) -> None:
    x, weight, history = step(ConvSpec("step", T=1, B=3), torch.bfloat16)
    pool, slots = history.float(), torch.tensor([2, 0, 1])
    spread = ops.strided(pool)
    y = short_conv_decode(x, weight, pool, slots, backend=backend)
    assert (y.dtype, pool.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(pool[:, :, -1][slots], x.float())
    assert torch.equal(short_conv_decode(ops.strided(x), ops.strided(weight), spread, slots, backend=backend), y)
    assert torch.equal(spread, pool)


@EACH_BACKEND
def test_a_batch_of_no_sequence_changes_nothing(backend: str) -> None:
    pool = torch.ones(2, 6, 3)
    y = short_conv_decode(torch.zeros(0, 6), torch.ones(6, 4), pool, torch.zeros(0, dtype=torch.int32), backend=backend)
    assert y.shape == (0, 6)
    assert torch.equal(pool, torch.ones(2, 6, 3))


@EACH_BACKEND
def test_the_step_compiles_whole_and_still_updates_the_pool(backend: str) -> None:
    x, weight, history = step(ConvSpec("step", T=1, B=3), torch.float32)
    slots = torch.tensor([2, -1, 0])
    pool, other = history.clone(), history.clone()
    torch._dynamo.reset()
    compiled = torch.compile(short_conv_decode, fullgraph=True, backend="aot_eager")
    y = short_conv_decode(x, weight, pool, slots, backend=backend)
    assert torch.equal(compiled(x, weight, other, slots, backend=backend), y)
    assert torch.equal(other, pool)
    assert not torch.equal(other, history)


@pytest.mark.parametrize(
    "op",
    [short_conv_decode_reference, pytest.param(short_conv_decode_cpu, marks=ops.NATIVE)],
    ids=["reference", "cpu"],
)
def test_the_custom_ops_pass_opcheck(op: Any) -> None:
    x, weight, history = step(ConvSpec("step", T=1, B=3), torch.float32)
    ops.opcheck(op, x, weight, history, torch.tensor([2, -1, 0]), True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"x": torch.zeros(2, 1, 6)},
            ShapeError,
            r"short_conv_decode: x is \[2, 1, 6\], expected \[any, any\] \(N, D\)",
        ),
        ({"pool": torch.zeros(3, 6, 4)}, ShapeError, r"pool is \[3, 6, 4\], expected \[any, 6, 3\] \(S, D, W - 1\)"),
        ({"slots": torch.tensor([0])}, ShapeError, r"slots is \[1\], expected \[2\] \(N\)"),
        ({"slots": torch.tensor([0.0, 1.0])}, DtypeError, "slots is torch.float32, expected int64 or int32"),
        ({"slots": torch.tensor([0, 3])}, ShapeError, "slots holds 3, expected -1 .* or a slot of the pool, 0 to 2"),
        ({"slots": torch.tensor([-2, 0])}, ShapeError, "slots holds -2"),
        ({"slots": torch.tensor([1, 1])}, ShapeError, "slots names slot 1 twice"),
        ({"weight": torch.zeros(6, 4, requires_grad=True)}, BackendError, "updates histories in place"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    right = {"x": torch.zeros(2, 6), "weight": torch.zeros(6, 4), "pool": torch.zeros(3, 6, 3)}
    with pytest.raises(error, match=message):
        short_conv_decode(**{**right, "slots": torch.tensor([0, 1]), **change})
