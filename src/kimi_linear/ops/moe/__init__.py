"""Mixture of experts: routing, and the routed experts' gated MLPs."""

from kimi_linear.ops.moe.api import grouped_mlp, route

__all__ = ["grouped_mlp", "route"]
