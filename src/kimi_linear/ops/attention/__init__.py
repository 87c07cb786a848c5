"""Causal softmax attention: whole prompts, one token against a cache, and multi-head latent attention."""

from kimi_linear.ops.attention.api import attention, mla_attention
from kimi_linear.ops.attention.api_decode import attention_decode, mla_decode

__all__ = ["attention", "attention_decode", "mla_attention", "mla_decode"]
