"""The native kernels of csrc/: find the library for this processor, and call its functions on tensors."""

from kimi_linear.ops.native.library import (
    LEVELS,
    active_level,
    available_levels,
    kernel,
    refuse,
    why_unavailable,
)

__all__ = ["LEVELS", "active_level", "available_levels", "kernel", "refuse", "why_unavailable"]
