"""The feed-forward networks: one line each. Layers are imported when they are first built: no torch here."""

from kimi_linear.nn.component import ComponentTable
from kimi_linear.nn.ffn.config import FFNConfig, MoEConfig, SwiGLUConfig

FFNS = ComponentTable("ffn")
FFNS.register(SwiGLUConfig, "kimi_linear.nn.ffn.swiglu:SwiGLU")
FFNS.register(MoEConfig, "kimi_linear.nn.ffn.moe:MixtureOfExperts")

__all__ = ["FFNS", "FFNConfig", "MoEConfig", "SwiGLUConfig"]
