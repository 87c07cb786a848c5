"""The linear layer, and products with weights that were packed once."""

from kimi_linear.ops.linear.api import linear
from kimi_linear.ops.linear.packed import PackedLinear

__all__ = ["PackedLinear", "linear"]
