"""The iteration in native code (csrc/orthogonalise.cpp): bfloat16 products, float32 sums, symmetric ones by half."""

import torch
from torch import Tensor

from kimi_linear.ops.native import kernel


def run(x: Tensor) -> Tensor:
    """Return the result for matrices [M, R, C] in the dtype of x."""
    wide = x.detach().to(torch.float32).contiguous()
    y = torch.empty_like(wide)
    kernel("orthogonalise", "ppiii")(wide, y, *wide.shape)
    return y.to(x.dtype)
