"""Short causal depthwise convolution with state."""

from kimi_linear.ops.conv.api import short_conv, short_conv_decode

__all__ = ["short_conv", "short_conv_decode"]
