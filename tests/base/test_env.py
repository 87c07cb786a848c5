import pytest

from kimi_linear.base import env
from kimi_linear.base.errors import ConfigError


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in env.VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", env.VARIABLES)
def test_an_unset_variable_has_its_default(name: str) -> None:
    assert env.read(name) == env.VARIABLES[name].default


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", True),
        ("true", True),
        ("YES", True),
        ("On", True),
        ("0", False),
        ("False", False),
        ("off", False),
        ("", False),
    ],
)
def test_a_flag_is_parsed(monkeypatch: pytest.MonkeyPatch, text: str, value: bool) -> None:
    monkeypatch.setenv("KIMI_LINEAR_DEBUG", text)
    assert env.read("KIMI_LINEAR_DEBUG") is value


@pytest.mark.parametrize("text", ["2", "maybe", " 1"])
def test_a_bad_value_is_an_error_that_says_what_is_expected(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("KIMI_LINEAR_DEBUG", text)
    with pytest.raises(ConfigError, match=f"KIMI_LINEAR_DEBUG is '{text}', expected 0 or 1: check values"):
        env.read("KIMI_LINEAR_DEBUG")


def test_a_change_is_seen_by_the_next_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIMI_LINEAR_BACKEND", "chunk")
    assert env.read("KIMI_LINEAR_BACKEND") == "chunk"
    monkeypatch.delenv("KIMI_LINEAR_BACKEND")
    assert env.read("KIMI_LINEAR_BACKEND") == ""


def test_a_variable_outside_the_table_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIMI_LINEAR_NO_SUCH", "1")
    with pytest.raises(KeyError):
        env.read("KIMI_LINEAR_NO_SUCH")
