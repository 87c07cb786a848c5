"""Short causal depthwise convolution with state."""

from kimi_linear.ops.conv.api import short_conv, short_conv_decode
from kimi_linear.ops.conv.context_parallel import short_conv_cp

__all__ = ["short_conv", "short_conv_cp", "short_conv_decode"]
