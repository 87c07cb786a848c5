"""The errors a user can meet. Each message says what was given, what was expected and what to do.

Every class derives from `KimiLinearError`, itself a `ValueError`, so callers may catch either.
"""


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
