"""The gated activation of a feed-forward network: silu(gate) * up."""

from kimi_linear.ops.swiglu.api import swiglu

__all__ = ["swiglu"]
