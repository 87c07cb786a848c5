"""A table from names to things, whose unknown-name error suggests the nearest known name."""

import difflib
from collections.abc import Iterator
from typing import Generic, TypeVar

from kimi_linear.base.errors import ConfigError, list_names, shown

T = TypeVar("T")


def unknown_name(what: str, name: str, known: list[str]) -> str:
    """Return the sentence for an unknown name: what was given, the nearest known one, all known ones."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {shown(name)}: {hint}known: {list_names(known, most=50)}."


class Registry(Generic[T]):
    """Names of one kind of thing, in the order they were added.

    Example:
        >>> colours = Registry[int]("colour")
        >>> colours.add("red", 1)
        >>> colours["red"]
        1
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._entries: dict[str, T] = {}

    def add(self, name: str, thing: T) -> None:
        """Add one entry; a name can be added once."""
        if name in self._entries:
            raise ConfigError(f"{self._what} {name!r} is registered twice; choose another name.")
        self._entries[name] = thing

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise ConfigError(unknown_name(self._what, name, list(self._entries)))
        return self._entries[name]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def items(self) -> list[tuple[str, T]]:
        """Return (name, thing) pairs in the order they were added."""
        return list(self._entries.items())
