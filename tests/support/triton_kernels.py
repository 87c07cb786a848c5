"""Kernels around single device functions. Imports triton."""

import triton
import triton.language as tl

from kimi_linear.ops.delta_rule.triton.device import unit_lower_inverse


@triton.jit
def inverse_kernel(lower, inverse, C: tl.constexpr):
    """Write (I + lower)^-1, [C, C]."""
    at = tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(inverse + at, unit_lower_inverse(tl.load(lower + at), C))
