"""What a layer's decode step refuses, before anything changes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_linear.base.errors import BackendError, ConfigError, DtypeError, KimiLinearError, ShapeError
from kimi_linear.ops import kda_layer_decode
from kimi_linear.ops.delta_rule.triton.layer_backend import refuse
from kimi_linear.ops.registry import Call
from support import ops
from support.layer_decode import POOLS, ROWS, Case, draw, mapped

F32, FP16 = torch.float32, torch.float16
every_backend = pytest.mark.parametrize("backend", ["plain", pytest.param("triton", marks=ops.TRITON)])


@pytest.mark.parametrize("backend", ["triton", "plain", "reference"])
def test_a_call_that_needs_a_gradient_is_refused(backend) -> None:
    inputs = draw(Case())
    places = [(name, None) for name in ROWS]
    places += [(name, field) for name in ("weights", "pools") for field in inputs[name]._fields]
    for name, field in places:
        leaf = (inputs[name] if field is None else getattr(inputs[name], field)).clone().requires_grad_()
        changed = leaf if field is None else inputs[name]._replace(**{field: leaf})
        with pytest.raises(BackendError, match="in place, so it has no gradient"):
            kda_layer_decode(**{**inputs, name: changed}, backend=backend)
    with torch.no_grad():
        kda_layer_decode(**{**inputs, name: changed}, backend="plain")


@every_backend
@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([0, 1, 5], r"slots holds 5, expected -1 \(skip\) or a slot of the pool, 0 to 4"),
        ([0, -2, 1], r"slots holds -2, expected -1"),
        ([3, -1, 3], r"slots names slot 3 twice"),
    ],
)
def test_bad_slots_are_refused_before_anything_changes(backend, slots, message) -> None:
    if ops.DEVICE != "cpu" and backend == "triton":
        pytest.skip("on a GPU the kernel skips them")
    inputs = draw(Case())
    before = mapped(inputs, torch.clone)["pools"]
    with pytest.raises(ShapeError, match=message):
        kda_layer_decode(**{**inputs, "slots": torch.tensor(slots, device=ops.DEVICE)}, backend=backend)
    assert all(torch.equal(getattr(inputs["pools"], name), getattr(before, name)) for name in POOLS)


def other(shape: tuple[int, ...], dtype: torch.dtype = F32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=ops.DEVICE)


WRONG: list[tuple[str, str | None, Any, type[KimiLinearError], str]] = [
    ("k", None, ((3, 2, 7),), ShapeError, r"k is \[3, 2, 7\], expected \[3, 2, 8\] \(N, H, K\)"),
    ("gate", None, ((3, 2, 6),), ShapeError, r"gate is .* \(N, HV, K\)"),
    ("output_gate", None, ((3, 2, 8),), ShapeError, r"output_gate is .* \(N, HV, V\)"),
    ("output_gate", None, ((3, 2, 6), torch.int32), DtypeError, "output_gate is torch.int32"),
    ("slots", None, ((3,),), DtypeError, "slots is torch.float32, expected int64 or int32"),
    ("slots", None, ((2,), torch.int64), ShapeError, r"slots is \[2\], expected \[3\]"),
    ("weights", "norm", ((8,),), ShapeError, r"weights.norm is \[8\], expected \[6\] \(V\)"),
    ("weights", "conv_q", ((16, 2, 2),), ShapeError, r"weights.conv_q is \[16, 2, 2\]"),
    ("weights", "conv_v", ((12, 3),), ShapeError, r"weights.conv_v is \[12, 3\], expected \[12, 4\]"),
    ("weights", "dt_bias", ((12,),), ShapeError, r"dt_bias is \[12\]"),
    ("pools", "conv_k", ((5, 16, 4),), ShapeError, r"pools.conv_k is .*, expected \[5, 16, 3\]"),
    ("pools", "conv_v", ((4, 12, 3),), ShapeError, r"pools.conv_v is .*, expected \[5, 12, 3\]"),
    ("pools", "recurrent", ((5, 2, 6, 8),), ShapeError, r"pools.recurrent is .* \(S, HV, K, V\)"),
    (
        "pools",
        "recurrent",
        ((5, 2, 8, 6), FP16),
        DtypeError,
        "pools.recurrent is torch.float16, expected torch.float32, or",
    ),
    ("activation", None, "gelu", ConfigError, "activation is 'gelu', expected 'sigmoid' or 'silu'"),
    ("lower_bound", None, 1.0, ConfigError, "lower_bound is 1.0"),
]


@pytest.mark.parametrize(("name", "field", "wrong", "error", "message"), WRONG)
def test_wrong_arguments_are_refused_before_anything_changes(name, field, wrong, error, message) -> None:
    inputs = draw(Case())
    before = mapped(inputs, torch.clone)["pools"]
    value = other(*wrong) if isinstance(wrong, tuple) else wrong
    changed = value if field is None else inputs[name]._replace(**{field: value})
    with pytest.raises(error, match=f"kda_layer_decode: {message}"):
        kda_layer_decode(**{**inputs, name: changed})
    assert all(torch.equal(getattr(inputs["pools"], n), getattr(before, n)) for n in POOLS)


def test_the_kernel_says_what_it_does_not_run() -> None:
    sizes = {"K": 128, "V": 128, "W": 17}
    call = Call("cuda", "float32", needs_grad=True, sizes=sizes)
    reasons = [reason for reason in refuse(call) if "triton is not" not in reason]
    assert [reason.split(",")[0] for reason in reasons] == [
        "updates states in place",
        "takes 16 taps at most",
    ]
    assert "K or V is above 256" in refuse(Call("cuda", "float32", needs_grad=False, sizes={"K": 257, "V": 1}))
