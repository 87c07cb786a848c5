"""Kimi Linear, end to end: operators, hybrid models, training, inference.

The names below load what they need on first use, so `import kimi_linear` alone is quick and loads no torch.

Example:
    >>> import kimi_linear
    >>> kimi_linear.preset("tiny").num_layers > 0
    True
"""

import importlib
from typing import TYPE_CHECKING, Any

from kimi_linear.base import env

if TYPE_CHECKING:
    from kimi_linear.causal_lm import KimiLinearForCausalLM, load_model
    from kimi_linear.models.kimi_linear.config import KimiLinearConfig
    from kimi_linear.models.kimi_linear.presets import preset

__version__ = "0.1.0"

env.ask_for_huge_pages()

__all__ = ["KimiLinearConfig", "KimiLinearForCausalLM", "__version__", "load_model", "preset"]

_HOMES = {
    "KimiLinearConfig": "kimi_linear.models.kimi_linear.config",
    "KimiLinearForCausalLM": "kimi_linear.causal_lm",
    "load_model": "kimi_linear.causal_lm",
    "preset": "kimi_linear.models.kimi_linear.presets",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
