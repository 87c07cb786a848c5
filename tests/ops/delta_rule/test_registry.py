"""Which backend runs a call, why the others do not, and what a forced choice does."""

import pytest
import torch
from torch import Tensor

from kimi_linear.base.errors import BackendError
from kimi_linear.ops import OPS, Call, delta_rule, delta_rule_decode, kda, kda_core, native, why
from kimi_linear.ops.delta_rule import api
from kimi_linear.ops.delta_rule.specs import DeltaRuleCase, make_inputs
from kimi_linear.ops.registry import Backend, Op
from kimi_linear.ops.triton.backend import INSTALLED
from support import ops

NAMES = ("delta_rule", "delta_rule_decode", "kda_core", "kda_core_decode")


def registered(op: str) -> list[str]:
    """Return the names of every backend of an operator, those that cannot run here too."""
    return [backend.name for backend in OPS[op].backends]


@pytest.mark.parametrize("op", NAMES)
def test_native_is_preferred_and_reference_is_last(op) -> None:
    assert registered(op) == ["cpu", "triton", "chunk", "reference"]


@pytest.mark.parametrize("op", NAMES)
def test_why_names_every_backend_with_its_verdict(op) -> None:
    call = Call("cpu", "float32", needs_grad=False, sizes={"B": 2, "T": 64}, features=frozenset({"packed"}))
    lines = why(op, call).splitlines()
    assert lines[0] == f"{op} on cpu, float32, without gradients, B=2, T=64, packed:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == registered(op)
    assert sum("runs it" in line for line in lines) == 1
    assert "  reference: could run it; a preferred backend comes first" in lines


@pytest.mark.parametrize("op", ["delta_rule_decode", "kda_core_decode"])
def test_why_gives_the_reason_of_a_refusal(op) -> None:
    text = why(op, Call("cpu", "float32", needs_grad=True))
    assert "with gradients" in text
    for name in ops.backends(op):
        assert f"  {name}: cannot: updates states in place, so it has no gradient" in text


def arguments() -> dict[str, Tensor]:
    return make_inputs(
        DeltaRuleCase(name="x", T=5, lengths=(2, 3), read="pre", erase="none", scalar_decay=True), torch.float32
    )


@pytest.fixture
def described(monkeypatch) -> list[Call]:
    """Collect the descriptions of calls that reach the registry."""
    calls: list[Call] = []

    def refuse(call: Call) -> list[str]:
        calls.append(call)
        return ["no such device"]

    watching = Op("delta_rule")
    watching.add(Backend("watching", lambda *_: None, refuse, "refuses all"))
    for backend in OPS["delta_rule"].backends:
        watching.add(backend)
    monkeypatch.setattr(api, "DELTA_RULE", watching)
    return calls


def test_a_backend_is_told_the_sizes_and_features_of_a_call(described) -> None:
    x = arguments()
    x["q"].requires_grad_()
    delta_rule(**x)
    assert described[0].sizes == {"B": 1, "T": 5, "H": 2, "HV": 2, "K": 8, "V": 6}
    assert described[0].features == {"packed", "scalar_decay", "no_erase", "pre_read", "initial_state"}
    assert (described[0].device, described[0].dtype, described[0].needs_grad) == ("cpu", "float32", True)
    with torch.no_grad():
        delta_rule(**x)
    assert not described[1].needs_grad


def test_a_call_without_features_has_none(described) -> None:
    x = torch.rand(1, 3, 1, 2)
    delta_rule(x, x, x, x, -x)
    assert described[0].features == frozenset()
    assert not described[0].needs_grad


def test_a_backend_asked_for_by_name_that_cannot_says_why_all_could_or_could_not(described) -> None:
    with pytest.raises(BackendError) as caught:
        delta_rule(**arguments(), backend="watching")
    missing, later = native.why_unavailable(), "could run it; a preferred backend comes first"
    triton = "could run it; only when asked for by name"
    if not INSTALLED:
        triton = "cannot: triton is not installed: pip install 'kimi-linear[triton]'"
    lines = str(caught.value).splitlines()
    assert lines[0] == "delta_rule: backend 'watching' cannot run this call."
    assert lines[2:] == [
        "  watching: cannot: no such device",
        f"  cpu: cannot: {missing}" if missing else "  cpu: runs it",
        f"  triton: {triton}",
        "  chunk: runs it" if missing else f"  chunk: {later}",
        f"  reference: {later}",
    ]


def test_an_unknown_backend_names_the_nearest() -> None:
    with pytest.raises(BackendError, match=r"delta_rule: unknown backend 'chunks': did you mean 'chunk'\? known: "):
        delta_rule(**arguments(), backend="chunks")


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=ops.NATIVE), "chunk", "reference"])
def test_a_named_backend_runs(backend) -> None:
    assert [b.name for b in OPS["delta_rule"].backends if b.name == backend] == [backend]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        delta_rule(**arguments(), backend=backend)
    ran = {event.key for event in profile.key_averages() if event.key.startswith("kimi_linear::delta_rule")}
    assert ran == {f"kimi_linear::delta_rule_{backend}"}


def test_the_environment_chooses_for_calls_that_do_not(monkeypatch) -> None:
    monkeypatch.setenv("KIMI_LINEAR_BACKEND", "reference")
    x = torch.rand(1, 3, 1, 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        kda(x, x, x, -x, torch.rand(1, 3, 1))
        kda_core(x, x, x, x, torch.rand(1, 3, 1), torch.zeros(1), None)
        delta_rule(x, x, x, x, -x, backend="chunk")
    ran = [event.key for event in profile.events() if event.key.startswith("kimi_linear::delta_rule")]
    assert ran == ["kimi_linear::delta_rule_reference"] * 2 + ["kimi_linear::delta_rule_chunk"]


def test_a_decode_that_needs_a_gradient_lists_every_backend() -> None:
    x = torch.rand(2, 1, 3, requires_grad=True)
    with pytest.raises(BackendError) as caught:
        delta_rule_decode(x, x, x, x, -x, torch.zeros(4, 1, 3, 3), torch.tensor([0, 1]))
    lines = str(caught.value).splitlines()
    assert lines[0] == "delta_rule_decode: no backend can run this call."
    assert "N=2, H=1, HV=1, K=3, V=3" in lines[1]
    assert [line.split(":")[0].strip() for line in lines[2:]] == registered("delta_rule_decode")
