"""The gated activation's kernels, each one pass over memory. Equations as in swiglu/reference.py."""

import triton
import triton.language as tl

from kimi_linear.ops.triton.device import save


@triton.jit
def load(x, at, inside):
    """Return elements of x as float32, zero outside."""
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


# The size is specialised on being a multiple of 16: unless its mask is, a load is not vectorised.
@triton.jit
def forward_kernel(gate, up, y, SIZE, BLOCK: tl.constexpr):
    """Eq. 1. Grid: blocks."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    x = load(gate, at, inside)
    save(y + at, x * tl.sigmoid(x) * load(up, at, inside), inside)


@triton.jit
def backward_kernel(d_y, gate, up, d_gate, d_up, SIZE, BLOCK: tl.constexpr):
    """Eq. 2. Grid: blocks."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    d, x = load(d_y, at, inside), load(gate, at, inside)
    s = tl.sigmoid(x)
    save(d_gate + at, d * load(up, at, inside) * (s * (1.0 + x * (1.0 - s))), inside)
    save(d_up + at, d * (x * s), inside)
