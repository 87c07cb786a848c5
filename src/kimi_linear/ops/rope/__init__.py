"""Rotary position embedding."""

from kimi_linear.ops.rope.api import apply_rope

__all__ = ["apply_rope"]
