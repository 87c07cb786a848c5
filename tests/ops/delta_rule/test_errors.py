"""Every bad argument of every entry: one sentence that names it, what it is and what it should be."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_linear import ops
from kimi_linear.base.errors import ConfigError, DeviceError, DtypeError, KimiLinearError, ShapeError

B, T, H, HV, K, V, N, S = 2, 5, 2, 4, 8, 6, 3, 7
Arguments = dict[str, Any]


def rand(*shape: int) -> Tensor:
    return torch.rand(shape)


def many() -> Arguments:
    return {"q": rand(B, T, H, K), "k": rand(B, T, H, K), "v": rand(B, T, HV, V)}


def one() -> Arguments:
    return {"q": rand(N, H, K), "k": rand(N, H, K), "v": rand(N, HV, V)}


POOL = {"pool": rand(S, HV, K, V), "slots": torch.arange(N)}
RAW = {"A_log": rand(HV), "dt_bias": rand(HV * K)}


def valid(op: str) -> Arguments:
    """Return arguments the operator takes."""
    vector, scalar, beta = -rand(B, T, HV, K), -rand(B, T, HV), rand(B, T, HV)
    arguments: dict[str, Arguments] = {
        "kda": {**many(), "log_decay": vector, "beta": beta},
        "gated_delta_rule": {**many(), "log_decay": scalar, "beta": beta},
        "gdn2": {**many(), "log_decay": vector, "erase_gate": rand(B, T, HV, K), "write_gate": rand(B, T, HV, V)},
        "comba": {**many(), "log_decay": scalar, "beta": beta, "erase_strength": beta},
        "ssd": {**many(), "log_decay": scalar},
        "kda_core": {**many(), "gate": rand(B, T, HV, K), "beta": beta, **RAW},
        "gated_delta_rule_decode": {**one(), "log_decay": -rand(N, HV), "beta": rand(N, HV), **POOL},
        "kda_core_decode": {**one(), "gate": rand(N, HV, K), "beta": rand(N, HV), **RAW, **POOL},
    }
    if op == "delta_rule":
        plain = {**many(), "erase_key": rand(B, T, HV, K), "log_decay": vector}
        return {"write_value": plain.pop("v"), **plain}
    if op == "delta_rule_decode":
        plain = {**one(), "erase_key": rand(N, HV, K), "log_decay": -rand(N, HV, K), **POOL}
        return {"write_value": plain.pop("v"), **plain}
    return arguments[op]


MANY = ("delta_rule", "kda", "gated_delta_rule", "gdn2", "comba", "ssd", "kda_core")
ONE = ("delta_rule_decode", "gated_delta_rule_decode", "kda_core_decode")


def refused(op: str, error: type[Exception], message: str, **changes: Any) -> None:
    with pytest.raises(error, match=message) as caught:
        getattr(ops, op)(**{**valid(op), **changes})
    assert isinstance(caught.value, ValueError)
    assert str(caught.value).startswith(f"{op}: ")


@pytest.mark.parametrize("op", [*MANY, *ONE])
def test_the_valid_arguments_are_taken(op) -> None:
    with torch.no_grad():
        getattr(ops, op)(**valid(op))


@pytest.mark.parametrize("op", [*MANY, *ONE])
def test_every_tensor_of_a_wrong_shape_is_named(op) -> None:
    for name, x in valid(op).items():
        # Another rank, which is wrong for every argument.
        wrong = x[None, ..., None, None, None]
        refused(op, ShapeError, rf"{name} is \[{', '.join(map(str, wrong.shape))}\], expected \[", **{name: wrong})


# Sizes nothing else fixes.
FREE = {("pool", 0), ("write_value", 3)}


@pytest.mark.parametrize("op", [*MANY, *ONE])
def test_every_tensor_of_a_wrong_size_is_refused(op) -> None:
    for name, x in valid(op).items():
        for axis in range(x.dim()):
            if (name, axis) in FREE or ((name, axis) == ("v", 3) and op != "gdn2"):
                continue
            wrong = torch.cat([x, x.narrow(axis, 0, 1)], axis)
            refused(op, ShapeError, r"expected", **{name: wrong})


@pytest.mark.parametrize("op", [*MANY, *ONE])
def test_every_tensor_of_integers_is_refused(op) -> None:
    for name, x in valid(op).items():
        if name == "slots":
            refused(op, DtypeError, r"slots is torch.float32, expected int64 or int32", slots=x.float())
        elif name != "pool":
            refused(
                op,
                DtypeError,
                rf"{name} is torch.int64, expected float32, bfloat16, float16 or float64",
                **{name: x.long()},
            )


@pytest.mark.parametrize("op", [*MANY, *ONE])
def test_every_tensor_on_another_device_is_refused(op) -> None:
    for name, x in valid(op).items():
        if name != "q":
            refused(
                op,
                DeviceError,
                rf"{name} is on meta but \w+ is on cpu; move them to one device",
                **{name: x.to("meta")},
            )


@pytest.mark.parametrize("op", [*MANY, *ONE])
def test_value_heads_come_in_whole_groups(op) -> None:
    head = 2 if op in MANY else 1
    for heads in (0, 3):
        changes = {
            name: x.narrow(head, 0, 1).repeat_interleave(heads, head) for name, x in valid(op).items() if name in "qk"
        }
        refused(op, ShapeError, rf"HV is 4 and H is {heads}, expected HV to be a multiple of H", **changes)


@pytest.mark.parametrize("op", MANY)
def test_initial_state_is_checked(op) -> None:
    state = rand(B, HV, K, V)
    wrong = r"initial_state is \[3, 4, 8, 6\], expected \[2, 4, 8, 6\] \(N, HV, K, V\)"
    refused(op, ShapeError, wrong, initial_state=rand(3, HV, K, V))
    refused(op, ShapeError, r"initial_state is \[2, 4, 6, 8\], expected", initial_state=state.transpose(2, 3))
    for dtype in (torch.bfloat16, torch.float64, torch.int64):
        message = rf"initial_state is {dtype}, expected torch.float32; states are never kept in less"
        refused(op, DtypeError, message, initial_state=state.to(dtype))
    refused(op, DeviceError, r"initial_state is on meta but q is on cpu", initial_state=state.to("meta"))


@pytest.mark.parametrize("op", ONE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64])
def test_the_pool_is_float32_or_bfloat16(op, dtype) -> None:
    message = rf"pool is {dtype}, expected torch.float32 or torch.bfloat16\."
    refused(op, DtypeError, message, pool=POOL["pool"].to(dtype))


def test_the_pool_of_float64_inputs_is_float64() -> None:
    wide = {n: x.double() if x.is_floating_point() else x for n, x in valid("delta_rule_decode").items()}
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(DtypeError, match=rf"pool is {dtype}, expected torch.float64\."):
            ops.delta_rule_decode(**{**wide, "pool": wide["pool"].to(dtype)})


@pytest.mark.parametrize("op", MANY)
def test_offsets_are_checked(op) -> None:
    single = {name: x[:1] if name not in RAW else x for name, x in valid(op).items()}

    def packed(error: type[Exception], message: str, offsets: Tensor) -> None:
        with pytest.raises(error, match=message):
            getattr(ops, op)(**single, cu_seqlens=offsets)

    refused(op, ShapeError, r"B is 2 with cu_seqlens, expected 1; concatenate", cu_seqlens=torch.tensor([0, T]))
    packed(DtypeError, r"cu_seqlens is torch.float32, expected int64 or int32", torch.tensor([0.0, T]))
    packed(ShapeError, r"cu_seqlens is \[1\], expected \[N \+ 1\]", torch.tensor([0]))
    packed(ShapeError, r"cu_seqlens is \[1, 2\], expected \[N \+ 1\]", torch.tensor([[0, T]]))
    packed(DeviceError, r"cu_seqlens is on meta, expected cpu", torch.tensor([0, T], device="meta"))
    packed(ShapeError, r"cu_seqlens runs from 0 to 4, expected from 0 to T = 5", torch.tensor([0, 4]))
    packed(ShapeError, r"cu_seqlens falls from 4 to 2 at index 2", torch.tensor([0, 4, 2, T]))
    state = rand(3, HV, K, V)
    with pytest.raises(ShapeError, match=r"initial_state is \[3, 4, 8, 6\], expected \[2, "):
        getattr(ops, op)(**single, cu_seqlens=torch.tensor([0, 2, T]), initial_state=state)


@pytest.mark.parametrize("backend", ["chunk", "reference"])
def test_offsets_are_checked_by_every_backend_in_the_backward_and_under_the_compiler_too(backend) -> None:
    x = {name: x[:1].requires_grad_() for name, x in valid("delta_rule").items()}
    compiled = torch.compile(ops.delta_rule, fullgraph=True, backend="aot_eager")
    with pytest.raises(ShapeError, match=r"cu_seqlens runs from 0 to 4"):
        compiled(**x, cu_seqlens=torch.tensor([0, 4]), backend=backend)


@pytest.mark.parametrize("op", ["delta_rule", "comba", "delta_rule_decode"])
def test_an_unknown_read_is_refused(op) -> None:
    refused(
        op, ConfigError, r"read is 'before', expected 'post' \(after the decay\) or 'pre' \(before it\)", read="before"
    )


@pytest.mark.parametrize(
    ("op", "shape", "message"),
    [
        (
            "kda",
            (B, T, HV),
            r"log_decay is \[2, 5, 4\], expected \[2, 5, 4, 8\] \(B, T, HV, K\); for one decay a head use",
        ),
        ("gdn2", (B, T, HV), r"log_decay is \[2, 5, 4\], expected \[2, 5, 4, 8\]"),
        (
            "gated_delta_rule",
            (B, T, HV, K),
            r"expected \[2, 5, 4\] \(B, T, HV\); for a decay per channel use kda or gdn2",
        ),
        ("comba", (B, T, HV, K), r"expected \[2, 5, 4\] \(B, T, HV\); for a decay per channel use kda or gdn2"),
    ],
)
def test_the_other_kind_of_decay_names_the_front_that_takes_it(op, shape, message) -> None:
    refused(op, ShapeError, message, log_decay=-rand(*shape))


@pytest.mark.parametrize("op", ["kda_core", "kda_core_decode"])
def test_the_gates_parameters_are_checked(op) -> None:
    refused(
        op, ConfigError, r"A_log is None, expected \[HV\] with the softplus gate; give it, or a lower_bound", A_log=None
    )
    for bound in (0.0, 5.0, float("nan")):
        refused(op, ConfigError, rf"lower_bound is {bound}, expected a negative number or None", lower_bound=bound)


def test_a_head_without_channels_is_refused() -> None:
    empty = {name: x[..., :0] for name, x in valid("delta_rule").items() if name != "write_value"}
    refused("delta_rule", ShapeError, r"K is 0, expected at least one channel", **empty)


class TestDebug:
    """KIMI_LINEAR_DEBUG adds a pass over the values."""

    @pytest.mark.parametrize("op", ["delta_rule", "kda", "gated_delta_rule", "gdn2", "comba", "ssd"])
    @pytest.mark.parametrize("bad", [0.25, float("nan"), float("inf")])
    def test_a_positive_log_decay_is_refused(self, monkeypatch, op, bad) -> None:
        log_decay = valid(op)["log_decay"]
        log_decay[1, 3] = bad
        arguments = {**valid(op), "log_decay": log_decay}
        getattr(ops, op)(**arguments)
        monkeypatch.setenv("KIMI_LINEAR_DEBUG", "1")
        with pytest.raises(
            KimiLinearError, match=rf"log_decay holds {bad}, expected natural logs of decays, every one <= 0"
        ):
            getattr(ops, op)(**arguments)

    def test_a_positive_log_decay_of_one_token_is_refused(self, monkeypatch) -> None:
        monkeypatch.setenv("KIMI_LINEAR_DEBUG", "1")
        refused(
            "delta_rule_decode",
            KimiLinearError,
            r"log_decay holds 0.5, expected natural",
            log_decay=rand(N, HV) * 0 + 0.5,
        )

    def test_good_values_pass(self, monkeypatch) -> None:
        monkeypatch.setenv("KIMI_LINEAR_DEBUG", "1")
        for op in MANY:
            getattr(ops, op)(**valid(op))
        zero = valid("delta_rule") | {"log_decay": torch.zeros(B, T, HV, K)}
        ops.delta_rule(**zero)

    def test_a_compiled_call_is_not_broken_by_it(self, monkeypatch) -> None:
        monkeypatch.setenv("KIMI_LINEAR_DEBUG", "1")
        torch.compiler.reset()
        torch.compile(ops.delta_rule, fullgraph=True, backend="aot_eager")(**valid("delta_rule"))
