"""Device functions every kernel may use: rounding, stores and products that mean the same interpreted and compiled."""

import triton
import triton.language as tl

from kimi_linear.base import env

# The interpreter cuts float32 off to bfloat16 where the hardware rounds, and multiplies bit patterns of bfloat16: there
# values are rounded by hand, and operands widened again.
INTERPRETED: tl.constexpr = tl.constexpr(env.triton_interprets())


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Return x in another dtype, rounded to nearest, ties to even."""
    if INTERPRETED:  # noqa: SIM102 - the kernel language has no short circuit
        if dtype == tl.bfloat16:
            bits = x.to(tl.float32).to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
            return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    return x.to(dtype)


@triton.jit
def save(at, x, mask):
    """Store x in the dtype of what `at` points to."""
    tl.store(at, narrow(x, at.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b, WIDE: tl.constexpr):
    """Return a b in float32, of operands rounded to bfloat16, or with WIDE in three times tf32, near float32."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32x3")
    a, b = narrow(a, tl.bfloat16), narrow(b, tl.bfloat16)
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b)


@triton.jit
def dot32(a, b):
    """Return a b of float32 operands to near float32, in three times tf32."""
    return tl.dot(a, b, input_precision="tf32x3")
