"""What an installation can use, and what to do about what it cannot. Checkpoints are for `recipes.checkup`."""

import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass

import torch

from kimi_linear.ops.native import active_level, available_levels, why_unavailable

# Optional packages and what they are for.
_OPTIONAL = {
    "matplotlib": "plots of the demonstration",
    "tensorboard": "training curves",
    "pyarrow": "reading .parquet text",
    "triton": "kernels for GPUs",
}


@dataclass(frozen=True)
class Finding:
    """One thing looked at; `good` is False where something could be better."""

    subject: str
    good: bool
    text: str


def examine() -> list[Finding]:
    """Return what was found, in the order to read it.

    Example:
        >>> examine()[0].subject
        'python'
    """
    return [
        Finding("python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding("torch", True, f"{torch.__version__}, {torch.get_num_threads()} threads"),
        _native(),
        _gpu(),
        *(_package(name, purpose) for name, purpose in _OPTIONAL.items()),
    ]


def _native() -> Finding:
    reason = why_unavailable()
    if reason is not None:
        return Finding("native CPU kernels", False, f"not used: {reason}. Everything works, several times slower.")
    level, levels = active_level(), available_levels()
    widest = levels[-1]
    text = f"level {level} of {', '.join(levels)}"
    return Finding("native CPU kernels", level == widest, text if level == widest else f"{text}; {widest} is faster")


def _gpu() -> Finding:
    if not torch.cuda.is_available():
        return Finding("GPU", False, "none that torch can use")
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return Finding("GPU", True, names)


def _package(name: str, purpose: str) -> Finding:
    if importlib.util.find_spec(name) is None:
        return Finding(name, False, f"not installed; for {purpose}: pip install {name}")
    return Finding(name, True, f"{importlib.metadata.version(name)}, for {purpose}")
