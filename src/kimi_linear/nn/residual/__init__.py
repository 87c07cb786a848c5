"""The residual schemes: one line each. Modules are imported when they are first built: no torch here."""

import importlib
from typing import Any

from kimi_linear.base.registry import Registry

RESIDUALS: Registry[str] = Registry("residual")
RESIDUALS.add("standard", "kimi_linear.nn.residual.standard:StandardResidual")


def build_residual(kind: str) -> Any:
    """Build the residual scheme of that kind."""
    module, _, name = RESIDUALS[kind].partition(":")
    return getattr(importlib.import_module(module), name)()
