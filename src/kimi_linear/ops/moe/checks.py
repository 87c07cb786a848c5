"""Checks of the chosen experts that need their values."""

from torch import Tensor

from kimi_linear.base import env
from kimi_linear.base.errors import ShapeError


def check_experts_values(experts: Tensor, E: int) -> None:
    """Raise ShapeError for an expert outside [0, E). Off the CPU only when debugging: it would wait for the device."""
    if experts.device.type != "cpu" and not env.read("KIMI_LINEAR_DEBUG"):
        return
    wrong = (experts < 0) | (experts >= E)
    if wrong.any():
        raise wrong_expert(int(experts[wrong][0]), E)


def wrong_expert(given: int, E: int) -> ShapeError:
    """Return the error for an expert outside [0, E)."""
    return ShapeError(f"grouped_mlp: experts holds {given}, expected the index of an expert, 0 to {E - 1}.")
