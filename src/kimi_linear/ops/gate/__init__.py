"""Forget gate: logits to log decay, in the softplus and the bounded form."""

from kimi_linear.ops.gate.api import forget_gate

__all__ = ["forget_gate"]
