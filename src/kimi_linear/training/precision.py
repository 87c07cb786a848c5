"""Arithmetic of a run: float32, or bfloat16 autocast where it is faster. Weights stay float32 either way."""

import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

PRECISIONS = ("auto", "fp32", "bf16")

# bfloat16 costs accuracy, so a tie goes to float32.
_WORTHWHILE = 0.95
_REPEATS = 3


@dataclass(frozen=True)
class Precision:
    """A choice made, with the measurement behind it; the seconds are None where nothing was measured."""

    name: str
    fp32_seconds: float | None = None
    bf16_seconds: float | None = None


def autocast(name: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which the forward pass of precision `name` runs: nothing for "fp32".

    Example:
        >>> with autocast("bf16", torch.device("cpu")):
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.bfloat16
    """
    return torch.autocast(device.type, dtype=torch.bfloat16) if name == "bf16" else nullcontext()


def choose_precision(model: nn.Module, loss: Callable[[nn.Module], Tensor], device: torch.device) -> Precision:
    """Measure whether bfloat16 autocast makes a forward and backward pass faster here, and return the faster.

    Runs on a copy, so that neither gradients nor anything a layer counts is left in the model, and with the random
    state put back. One pass each to warm up, then the median of three, taken in turns: at most eight passes.

    Args:
        model: The model to train.
        loss: Its loss on a typical micro-batch, given the copy.
        device: Where the model lies.

    Example:
        >>> x = torch.ones(8, 64)
        >>> choice = choose_precision(nn.Linear(64, 64), lambda trial: trial(x).sum(), torch.device("cpu"))
        >>> choice.name in ("fp32", "bf16")
        True
    """
    trial = copy.deepcopy(model)
    seconds: dict[str, list[float]] = {"fp32": [], "bf16": []}
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for _ in range(1 + _REPEATS):
            for name, taken in seconds.items():
                taken.append(_time(trial, loss, name, device))
    fp32, bf16 = (median(taken[1:]) for taken in seconds.values())
    return Precision("bf16" if bf16 < _WORTHWHILE * fp32 else "fp32", fp32, bf16)


def _time(trial: nn.Module, loss: Callable[[nn.Module], Tensor], name: str, device: torch.device) -> float:
    trial.zero_grad(set_to_none=True)
    _wait(device)
    start = time.perf_counter()
    with autocast(name, device):
        value = loss(trial)
    value.backward()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
