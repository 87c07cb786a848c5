"""RMSNorm, gated RMSNorm and L2 norm."""

from kimi_linear.ops.norm.api import gated_rms_norm, l2_norm, rms_norm

__all__ = ["gated_rms_norm", "l2_norm", "rms_norm"]
