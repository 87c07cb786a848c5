"""Rotary positions in the obvious form, and the only one needed: the rotation is memory-bound.

angle_{t,i} = position_t * theta ** (-2 i / K),   i = 0 .. K/2 - 1                       (1)
y_i       = x_i cos - x_{i + K/2} sin                                                    (2)
y_{i+K/2} = x_{i + K/2} cos + x_i sin                                                    (3)
"""

import torch
from torch import Tensor

from kimi_linear.ops.checks import compute_dtype
from kimi_linear.ops.rope import autograd


@torch.library.custom_op("kimi_linear::rope_reference", mutates_args=())
def rope_reference(x: Tensor, positions: Tensor, theta: float, inverse: bool) -> Tensor:
    """Equations 1 to 3 for x [B, T, H, K] and positions [B, T] or [T]; `inverse` turns back."""
    wide, half = compute_dtype(x), x.shape[-1] // 2
    # Angles in float64: at position 10^6 float32 would miss by several hundredths of a radian.
    frequency = theta ** -(torch.arange(half, device=x.device, dtype=torch.float64) / half)
    # [T, 1, K/2] or [B, T, 1, K/2]; Eq. 1
    angle = positions[..., None, None].double() * frequency
    cos, sin = angle.cos().to(wide), angle.sin().to(wide)
    if inverse:
        sin = -sin
    low, high = x[..., :half].to(wide), x[..., half:].to(wide)
    # Eqs. 2 and 3
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(x.dtype)


autograd.register(rope_reference)
