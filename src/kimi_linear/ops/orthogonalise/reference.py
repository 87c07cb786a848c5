"""The iteration as it is written, in the dtype of its input (float32 at least).

    X_0 = x / (|x|_F + tiny)                                                     (1)
    A = X X^T                                                                    (2)
    X <- a X + (b A + c A A) X,   five times                                     (3)

A tall x goes in transposed, so that A is the smaller of the two squares.
"""

import torch
from torch import Tensor

from kimi_linear.ops.autocast import without_autocast
from kimi_linear.ops.checks import compute_dtype

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
# Keeps 0 / 0 away from a matrix of zeros.
TINY = 1e-7


def wide_and_unit(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Eq. 1 on matrices [M, R, C], transposed where R > C."""
    wide = x.to(compute_dtype(x))
    wide = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=TINY)
    return (wide.mT if x.shape[-2] > x.shape[-1] else wide).to(dtype)


def iterate(unit: Tensor) -> Tensor:
    """Equations 2 and 3 in the dtype given."""
    a, b, c = COEFFICIENTS
    with without_autocast(unit.device):
        for _ in range(STEPS):
            gram = torch.bmm(unit, unit.mT)
            update = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            unit = torch.baddbmm(unit, update, unit, beta=a)
    return unit


def run(x: Tensor) -> Tensor:
    """Return the result for matrices [M, R, C] in the dtype of x."""
    y = iterate(wide_and_unit(x, compute_dtype(x)))
    return (y.mT if x.shape[-2] > x.shape[-1] else y).to(x.dtype).contiguous()
