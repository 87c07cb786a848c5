import json
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_linear.base.config import check_keys, from_dict, read_json, to_dict
from kimi_linear.base.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    width: int
    names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outer:
    size: int
    rate: float = 0.5
    inner: Inner = field(default_factory=lambda: Inner(width=1))
    table: dict[str, Inner] = field(default_factory=dict)


def test_a_config_becomes_plain_nested_dictionaries() -> None:
    config = Outer(size=2, inner=Inner(width=3, names=("a", "b")), table={"x": Inner(width=4)})
    assert to_dict(config) == {
        "size": 2,
        "rate": 0.5,
        "inner": {"width": 3, "names": ["a", "b"]},
        "table": {"x": {"width": 4, "names": []}},
    }


def test_a_config_class_is_not_taken_for_a_config() -> None:
    assert to_dict(Inner) is Inner


@given(width=st.integers(), names=st.lists(st.text()))
def test_a_flat_config_survives_json(width: int, names: list[str]) -> None:
    config = Inner(width=width, names=tuple(names))
    assert from_dict(Inner, json.loads(json.dumps(to_dict(config)))) == config


def test_missing_keys_take_their_defaults() -> None:
    assert from_dict(Inner, {"width": 3}) == Inner(width=3)


def test_an_unknown_key_names_the_nearest_known_one() -> None:
    with pytest.raises(
        ConfigError, match=r"model\.json: unknown key 'widht': did you mean 'width'\? known: names, width"
    ):
        from_dict(Inner, {"width": 1, "widht": 2}, "model.json")


def test_a_key_without_default_must_be_given() -> None:
    with pytest.raises(ConfigError, match="config: key 'width' is missing and has no default; add it"):
        from_dict(Inner, {})


def test_a_key_with_a_default_factory_may_be_missing() -> None:
    check_keys(Outer, {"size": 1}, "config")


@pytest.mark.parametrize("given_value", [[1], "text", 3, None])
def test_anything_but_an_object_is_refused_by_its_type(given_value: object) -> None:
    expected = f"layers is {type(given_value).__name__}, expected an object with fields of Inner"
    with pytest.raises(ConfigError, match=expected):
        check_keys(Inner, given_value, "layers")  # type: ignore[arg-type]


def test_a_key_that_is_not_a_string_is_unknown_not_a_crash() -> None:
    with pytest.raises(ConfigError, match="unknown key '3'"):
        check_keys(Inner, {3: 1}, "config")  # type: ignore[dict-item]


def test_a_json_object_is_read(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"a": [1, "é"]}', encoding="utf-8")
    assert read_json(path) == {"a": [1, "é"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"[1]", "holds a JSON list, expected an object"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_a_bad_file_is_one_sentence_that_names_it(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_json(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_json(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_json(tmp_path)


def test_fields_keep_their_order_in_the_dictionary() -> None:
    assert list(to_dict(Outer(size=1))) == [f.name for f in fields(Outer)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": "2"}, "config.size is '2', expected int"),
        ({"size": True}, "config.size is True, expected int"),
        ({"size": 1, "rate": None}, "config.rate is None, expected float"),
        ({"size": 1, "inner": {"width": 1, "names": [1]}}, r"config.inner.names is \[1\], expected tuple"),
        ({"size": 1, "inner": 3}, "config.inner is int, expected an object"),
    ],
)
def test_a_value_of_another_type_is_named_with_its_path(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(Outer, given)


def test_nested_configs_are_built_and_an_integer_is_a_float_too() -> None:
    config = from_dict(Outer, {"size": 1, "rate": 1, "inner": {"width": 2, "names": ["a"]}})
    assert config == Outer(size=1, rate=1, inner=Inner(width=2, names=("a",)))
