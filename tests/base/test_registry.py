import pytest

from kimi_linear.base.errors import ConfigError, KimiLinearError
from kimi_linear.base.registry import Registry, unknown_name


@pytest.fixture
def colours() -> Registry[int]:
    registry = Registry[int]("colour")
    for number, name in enumerate(["violet", "red", "green"]):
        registry.add(name, number)
    return registry


def test_entries_are_found_by_name_in_the_order_they_were_added(colours: Registry[int]) -> None:
    assert list(colours) == ["violet", "red", "green"]
    assert colours.items() == [("violet", 0), ("red", 1), ("green", 2)]
    assert colours["red"] == 1
    assert len(colours) == 3
    assert "red" in colours
    assert "blue" not in colours


def test_an_unknown_name_suggests_the_nearest_and_lists_all(colours: Registry[int]) -> None:
    with pytest.raises(ConfigError, match=r"unknown colour 'gren': did you mean 'green'\? known: green, red, violet\."):
        colours["gren"]


def test_a_name_like_no_other_gets_no_suggestion(colours: Registry[int]) -> None:
    with pytest.raises(ConfigError, match=r"^unknown colour 'qqqq': known: green, red, violet\.$"):
        colours["qqqq"]


def test_a_name_is_added_once_and_the_first_stays(colours: Registry[int]) -> None:
    with pytest.raises(ConfigError, match="colour 'red' is registered twice"):
        colours.add("red", 9)
    assert colours["red"] == 1


def test_the_items_are_a_copy(colours: Registry[int]) -> None:
    colours.items().clear()
    assert len(colours) == 3


def test_an_empty_registry_says_so_without_failing() -> None:
    assert unknown_name("thing", "a", []) == "unknown thing 'a': known: ."


def test_every_error_of_the_package_can_be_caught_as_a_value_error() -> None:
    assert issubclass(ConfigError, KimiLinearError)
    assert issubclass(KimiLinearError, ValueError)
