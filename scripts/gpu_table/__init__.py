"""The calls whose kernels are compiled offline: `calls()` of a module yields names and calls on empty tensors."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

Named = tuple[str, Callable[[], Any]]


def calls() -> Iterator[Named]:
    """Return the calls of every module here that has some, named after it."""
    for found in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{found.name}")
        for name, call in module.calls() if hasattr(module, "calls") else ():
            yield f"{found.name} {name}", call
