"""The registry of operators: automatic choice, forced choice, explanations, refusals."""

from collections.abc import Callable

import pytest

from kimi_linear.base.errors import BackendError, ConfigError
from kimi_linear.ops import registry
from kimi_linear.ops.registry import Backend, Call, Op

CALL = Call(device="cpu", dtype="float32", needs_grad=False, sizes={"B": 2, "T": 5}, features=frozenset({"packed"}))


def never(*_: object) -> None:
    raise AssertionError("choosing must not run a backend")


def backend(name: str, *reasons: str) -> Backend:
    return Backend(name, never, lambda call: list(reasons), f"the {name} one")


def op(*backends: Backend) -> Op:
    made = Op("toy")
    for one in backends:
        made.add(one)
    return made


@pytest.fixture(autouse=True)
def _no_preference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KIMI_LINEAR_BACKEND", raising=False)


def test_the_most_preferred_backend_that_can_is_chosen() -> None:
    assert op(backend("triton", "no GPU"), backend("chunk"), backend("reference")).choose(CALL).name == "chunk"
    assert op(backend("triton"), backend("chunk"), backend("reference")).choose(CALL).name == "triton"


def test_a_named_backend_is_chosen_over_a_preferred_one() -> None:
    assert op(backend("chunk"), backend("reference")).choose(CALL, "reference").name == "reference"


def test_a_named_backend_that_cannot_is_an_error_with_every_reason_and_no_fallback() -> None:
    toy = op(backend("triton", "no GPU", "Triton is not installed"), backend("chunk"), backend("reference"))
    with pytest.raises(BackendError) as caught:
        toy.choose(CALL, "triton")
    text = str(caught.value)
    assert text.startswith("toy: backend 'triton' cannot run this call.")
    assert "triton: cannot: no GPU; Triton is not installed" in text
    assert "chunk: runs it" in text
    assert "reference: could run it" in text


def test_when_no_backend_can_the_error_lists_them_all() -> None:
    with pytest.raises(BackendError, match="no backend can run this call") as caught:
        op(backend("chunk", "wrong dtype"), backend("reference", "too long")).choose(CALL)
    assert "chunk: cannot: wrong dtype" in str(caught.value)
    assert "reference: cannot: too long" in str(caught.value)


def test_an_unknown_backend_suggests_the_nearest() -> None:
    with pytest.raises(BackendError, match=r"toy: unknown backend 'chunks': did you mean 'chunk'\?"):
        op(backend("chunk"), backend("reference")).choose(CALL, "chunks")


def test_a_backend_sees_the_call_it_is_asked_about() -> None:
    seen: list[Call] = []

    def refuse(call: Call) -> list[str]:
        seen.append(call)
        return ["T is odd"] if call.sizes["T"] % 2 else []

    toy = op(Backend("chunk", never, refuse, ""), backend("reference"))
    assert toy.choose(CALL).name == "reference"
    assert toy.choose(Call("cpu", "float32", False, {"T": 4})).name == "chunk"
    assert seen[0] is CALL


def test_the_explanation_names_the_call_and_judges_every_backend() -> None:
    text = op(backend("triton", "no GPU"), backend("chunk"), backend("reference")).why(CALL)
    assert text.splitlines() == [
        "toy on cpu, float32, without gradients, B=2, T=5, packed:",
        "  triton: cannot: no GPU",
        "  chunk: runs it",
        "  reference: could run it; a preferred backend comes first",
    ]
    assert "with gradients" in op().why(Call("cpu", "float32", True))


def test_the_variable_names_the_backend_of_calls_that_name_none(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = op(backend("chunk"), backend("reference"))
    monkeypatch.setenv("KIMI_LINEAR_BACKEND", "reference")
    assert toy.choose(CALL).name == "reference"
    assert toy.choose(CALL, "chunk").name == "chunk"


def test_the_variable_forces_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIMI_LINEAR_BACKEND", "triton")
    with pytest.raises(BackendError, match="backend 'triton' cannot run this call"):
        op(backend("triton", "no GPU"), backend("reference")).choose(CALL)


def test_an_operator_without_the_variables_backend_keeps_its_own_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIMI_LINEAR_BACKEND", "sdpa")
    assert op(backend("chunk"), backend("reference")).choose(CALL).name == "chunk"


def test_a_misspelt_variable_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIMI_LINEAR_BACKEND", "referense")
    with pytest.raises(BackendError, match=r"unknown backend 'referense': did you mean 'reference'\?"):
        op(backend("chunk"), backend("reference")).choose(CALL)


def test_a_backend_is_registered_once() -> None:
    with pytest.raises(BackendError, match="toy: backend 'chunk' is registered twice"):
        op(backend("chunk"), backend("chunk"))


def test_backends_are_listed_in_order_of_preference() -> None:
    assert [b.name for b in op(backend("chunk"), backend("reference")).backends] == ["chunk", "reference"]


@pytest.fixture
def fresh_table(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Op]:
    monkeypatch.setattr(registry, "OPS", registry.Registry("operator"))
    return registry.define


def test_a_defined_operator_is_found_by_name(fresh_table: Callable[..., Op]) -> None:
    toy = fresh_table("toy", backend("chunk", "no"), backend("reference"))
    assert registry.OPS["toy"] is toy
    assert "reference: runs it" in registry.why("toy", CALL)


def test_an_operator_is_defined_once_and_an_unknown_one_is_named(fresh_table: Callable[..., Op]) -> None:
    fresh_table("toy", backend("chunk"))
    with pytest.raises(ConfigError, match="operator 'toy' is registered twice"):
        fresh_table("toy", backend("chunk"))
    with pytest.raises(ConfigError, match="unknown operator 'toyy': did you mean 'toy'"):
        registry.why("toyy", CALL)
