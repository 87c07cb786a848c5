"""Public names change only on purpose: a changed one shows in a diff of `public_names.txt`."""

import importlib

import pytest

from support import public_names

RECORDED = public_names.parse(public_names.RECORD.read_text(encoding="utf-8"))


def test_public_names_are_as_recorded() -> None:
    found = public_names.current()
    assert found == RECORDED, "if this was meant: python tests/support/public_names.py, and a line in CHANGELOG.md"


@pytest.mark.parametrize("module", [name for name in RECORDED if name != "commands"])
def test_every_public_name_exists_and_is_listed_by_dir(module: str) -> None:
    loaded = importlib.import_module(module)
    for name in RECORDED[module]:
        assert getattr(loaded, name) is not None
    assert set(RECORDED[module]) <= set(dir(loaded))


@pytest.mark.parametrize("module", [name for name in RECORDED if name != "commands"])
def test_every_public_name_is_documented(module: str) -> None:
    loaded = importlib.import_module(module)
    things = [getattr(loaded, name) for name in RECORDED[module]]
    undocumented = [thing for thing in things if callable(thing) and not (thing.__doc__ or "").strip()]
    assert undocumented == []


def test_an_unknown_name_is_an_attribute_error() -> None:
    for module in RECORDED:
        if module != "commands":
            with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
                importlib.import_module(module).no_such_name  # noqa: B018 -- the access is the test


def test_the_record_survives_a_round_trip() -> None:
    surfaces = {"a": ["x", "y"], "b": []}
    assert public_names.parse(public_names.render(surfaces)) == surfaces
