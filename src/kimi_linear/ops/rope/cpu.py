"""Rotary positions on the CPU: csrc/rope.cpp, one pass over memory; the backward is the forward at -position."""

import torch
from torch import Tensor

from kimi_linear.ops import native
from kimi_linear.ops.native.library import DTYPES
from kimi_linear.ops.rope import autograd


@torch.library.custom_op("kimi_linear::rope_cpu", mutates_args=())
def rope_cpu(x: Tensor, positions: Tensor, theta: float, inverse: bool) -> Tensor:
    """Turn x [B, T, H, K] by positions [B, T] or [T]; `inverse` turns back."""
    y = x.new_empty(x.shape)
    B, T, H, K = x.shape
    native.kernel("rope", "ippifipiiii")(
        *(DTYPES[x.dtype], x.contiguous(), positions.long().contiguous(), positions.ndim == 2, theta, inverse, y),
        *(B, T, H, K // 2),
    )
    return y


autograd.register(rope_cpu)
