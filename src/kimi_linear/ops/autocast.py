"""Where an op meets the caller's autocast: inputs are cast at the entry, and the implementation runs without it.

An op's implementation runs below the caller's autocast, which would otherwise change the dtypes of its matrix products
behind its back and make the result disagree with the fake kernel.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for that type of device; devices without autocast say no."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def cast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in the dtype of the active autocast, as for `torch.matmul`; unchanged where there is none.

    Float64 stays: autocast leaves it alone everywhere.
    """
    device = tensors[0].device.type
    if not autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that `cast_inputs` would give the tensor, without casting it."""
    if not autocast_enabled(x.device.type) or not x.is_floating_point() or x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which matrix products keep the dtype they are given."""
    return torch.autocast(device.type, enabled=False) if autocast_enabled(device.type) else nullcontext()
