"""The errors a user can meet. Each message says what was given, what was expected and what to do.

Every class derives from `KimiLinearError`, itself a `ValueError`, so callers may catch either.

What a message quotes may come from a damaged or hostile file. `shown`, `plain` and `list_names` keep it short and on
one line, and keep control characters away from the terminal.
"""

import reprlib
from collections.abc import Iterable

# Characters of one quoted value or name.
_MOST_CHARACTERS = 200

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 2, 8, 8, 4
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 100


class KimiLinearError(ValueError):
    """Base of every error this package raises on purpose."""


class ConfigError(KimiLinearError):
    """A configuration names something unknown, misses something, or contradicts itself."""


class ShapeError(KimiLinearError):
    """A tensor's shape disagrees with the others; names the argument, what it is and what it should be."""


class DtypeError(KimiLinearError):
    """A tensor's dtype cannot be used where it was given."""


class DeviceError(KimiLinearError):
    """Tensors of one call lie on different devices, or on one that cannot run it."""


class BackendError(KimiLinearError):
    """No backend, or not the named one, can run a call; lists every backend with its reasons."""


class CheckpointError(KimiLinearError):
    """A checkpoint is missing, truncated, corrupt, or not of the expected model."""


class DataError(KimiLinearError):
    """A text file or a token shard cannot be read or holds nothing usable."""


class StateError(KimiLinearError):
    """A cache or a state does not fit the model, the batch or the layout it is used with."""


def shown(value: object) -> str:
    """Return the `repr` of a value of any size, long ones cut in the middle or at the end.

    Cost: that of the part that is shown, however large the value is.

    Example:
        >>> shown([0] * 10**6)
        '[0, 0, 0, 0, 0, 0, 0, 0, ...]'
    """
    return _cut(_SHORT.repr(value))


def plain(text: str) -> str:
    r"""Return a name as it is if it is short and printable, else its `repr`, cut.

    Example:
        >>> print(plain("model.norm.weight"), plain("two\nlines"))
        model.norm.weight 'two\nlines'
    """
    return text if text.isprintable() and len(text) <= _MOST_CHARACTERS else shown(text)


def list_names(names: Iterable[str], most: int = 10) -> str:
    """Return the first names of a set, sorted, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(map(plain, ordered[:most])) + more


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 3] + "..."
