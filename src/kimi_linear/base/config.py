"""Frozen dataclasses to and from plain dictionaries. Unknown keys are errors that name the nearest known one.

Configs are keyword-only frozen dataclasses of plain values, tuples, dicts and other configs. Nothing here imports
torch, so reading or writing a config costs no start-up time and needs no GPU.
"""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from kimi_linear.base.errors import ConfigError
from kimi_linear.base.registry import unknown_name

C = TypeVar("C")


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
        expected = hint if typing.get_args(hint) else getattr(hint, "__name__", hint)
        raise ConfigError(f"{where} is {value!r}, expected {expected}.")


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
    """Read a JSON object from a file, or raise ConfigError with one sentence."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; give the path of a JSON file.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a JSON {type(value).__name__}, expected an object.")
    return value
