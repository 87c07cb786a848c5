"""Frozen dataclasses to and from plain dictionaries. Unknown keys are errors that name the nearest known one.

Configs are keyword-only frozen dataclasses of plain values, tuples, dicts and other configs. Nothing here imports
torch, so reading or writing a config costs no start-up time and needs no GPU.
"""

import dataclasses
import functools
import json
import sys
import types
import typing
from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

from kimi_linear.base.errors import ConfigError, shown
from kimi_linear.base.registry import unknown_name

C = TypeVar("C")

# Of a JSON file, sixteen times the released checkpoint's index. What is read takes at most some thirty times as much.
MAX_JSON_BYTES = 2**25
# Of lists and objects in each other; the files read here need four.
MAX_JSON_DEPTH = 64


def to_dict(config: Any) -> Any:
    """Return a config as nested plain dictionaries and lists, ready for JSON."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    return config


def check_keys(cls: type, given: dict[str, Any], where: str) -> None:
    """Raise ConfigError for the first key of `given` that is not a field of `cls`, or a field with no value."""
    if not isinstance(given, dict):
        raise ConfigError(f"{where} is {type(given).__name__}, expected an object with fields of {cls.__name__}.")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in given:
        if key not in fields:
            raise ConfigError(f"{where}: {unknown_name('key', str(key), list(fields))}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in given:
            raise ConfigError(f"{where}: key {name!r} is missing and has no default; add it.")


def from_dict(cls: type[C], given: dict[str, Any], where: str = "config") -> C:
    """Build a config from plain values, its parts included, checking keys and types; lists become tuples."""
    check_keys(cls, given, where)
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, value in given.items():
        hint, path = hints[name], f"{where}.{name}"
        if dataclasses.is_dataclass(hint):
            values[name] = from_dict(typing.cast(type, hint), value, path)
            continue
        check_type(value, hint, path)
        values[name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


def check_type(value: Any, hint: Any, where: str) -> None:
    """Raise ConfigError unless a plain value is of the annotated type."""
    if not _fits(value, hint):
        options = typing.get_args(hint)
        is_choice = typing.get_origin(hint) is typing.Literal
        expected = " or ".join(map(repr, options)) if is_choice else hint if options else hint.__name__
        raise ConfigError(f"{where} is {shown(value)}, expected {expected}.")


def check_fields(config: Any, where: str) -> None:
    """Raise ConfigError unless every field of a config is of its annotated type, and every number finite.

    Whole numbers are left out: what checks their range says better what is expected.
    """
    for name, hint in _hints(config.__class__).items():
        if hint in (int, int | None):
            continue
        value = getattr(config, name)
        check_type(value, hint, f"{where}{name}")
        # The comparison fails for NaN too, and for whole numbers that no float holds.
        if isinstance(value, (int, float)) and not abs(value) <= sys.float_info.max:
            raise ConfigError(f"{where}{name} is {shown(value)}, expected a finite number.")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a plain value is of the annotated type; an integer is a float too, a boolean is neither."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is typing.Literal:
        return value in options
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, option) for option in options)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return False
        if options[-1] is Ellipsis:
            return all(_fits(item, options[0]) for item in value)
        return len(value) == len(options) and all(map(_fits, value, options))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ConfigError: No such file, not a regular one, larger than MAX_JSON_BYTES, or what `parse_json` refuses.

    Cost: bounded, whatever lies at the path.
    """
    try:
        # A pipe would be waited on, a device never ends.
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path} cannot be read: it is not a regular file; give the path of a JSON file.")
        with path.open("rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; give the path of a JSON file.") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    if len(content) > MAX_JSON_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_JSON_BYTES} bytes, the most that is read of a JSON file.")
    return parse_json(content, str(path))


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object that bytes hold.

    Raises:
        ConfigError: Not UTF-8, not JSON, not an object, nested deeper than MAX_JSON_DEPTH, or with a key given twice,
            of which each reader would choose another one.

    Example:
        >>> parse_json(b'{"a": [1, 2]}', "example")
        {'a': [1, 2]}
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ConfigError(f"{where} gives the key {shown(repeated)} more than once; keep one of them.")
        return found

    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} cannot be read: {error}.") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not valid JSON: {error}.") from error
    except RecursionError as error:
        raise ConfigError(_too_deep(where)) from error
    except ConfigError:
        raise
    except ValueError as error:
        # Python reads no number of more than 4300 digits.
        raise ConfigError(f"{where} is not valid JSON: it holds a number of too many digits.") from error
    if _is_deep(value):
        raise ConfigError(_too_deep(where))
    if not isinstance(value, dict):
        raise ConfigError(f"{where} holds a JSON {type(value).__name__}, expected an object.")
    return value


def _too_deep(where: str) -> str:
    return f"{where} is nested deeper than {MAX_JSON_DEPTH} levels, the most that is read."


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        containers = [item for item in level if isinstance(item, (dict, list))]
        level = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]
    return bool(level)
