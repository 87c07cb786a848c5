"""The iteration with its products in bfloat16, all matrices at once. Equations as numbered in reference.py."""

import torch
from torch import Tensor

from kimi_linear.ops.orthogonalise.reference import iterate, wide_and_unit


def run(x: Tensor) -> Tensor:
    """Return the result for matrices [M, R, C] in the dtype of x."""
    y = iterate(wide_and_unit(x, torch.bfloat16).contiguous())
    return (y.mT if x.shape[-2] > x.shape[-1] else y).to(x.dtype).contiguous()
