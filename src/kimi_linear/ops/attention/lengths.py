"""How many cached positions each sequence of a decode call has, and which of them its query sees."""

import torch
from torch import Tensor

from kimi_linear.base import env
from kimi_linear.base.errors import ShapeError


def check_lengths_values(lengths: Tensor, S: int) -> None:
    """Raise ShapeError for a length outside [0, S]. Off the CPU only when debugging: it would wait for the device."""
    if lengths.device.type != "cpu" and not env.read("KIMI_LINEAR_DEBUG"):
        return
    wrong = (lengths < 0) | (lengths > S)
    if wrong.any():
        n = int(wrong.nonzero()[0])
        raise ShapeError(f"lengths[{n}] is {int(lengths[n])}, expected 0 to S = {S}, the positions the cache holds.")


def seen(lengths: Tensor, S: int, window: int | None) -> Tensor:
    """Return which positions each sequence's query sees, bool [N, S]."""
    position, end = torch.arange(S, device=lengths.device), lengths[:, None]
    mask = position < end
    return mask if window is None else mask & (position >= end - window)
