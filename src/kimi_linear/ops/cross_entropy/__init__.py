"""Cross entropy of a linear head, never all logits at once."""

from kimi_linear.ops.cross_entropy.api import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
