"""Configuration of Gated DeltaNet. No torch."""

import dataclasses
from typing import ClassVar, Literal

from kimi_linear.nn.component import Shapes
from kimi_linear.nn.mixers.delta.config import DeltaConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class GDNConfig(DeltaConfig):
    """Gated DeltaNet (arXiv:2412.06464): one decay a head.

    The defaults are the baseline of the Kimi Linear paper: a sigmoid output gate of rank `head_dim`, everything else
    as in Kimi Delta Attention. `full_rank_gate=True, gate_activation="silu"` is the layer of the original paper.
    Sizes: see `DeltaConfig`.

    Args:
        full_rank_gate: One matrix for the output gate (g_proj) instead of two (g_a_proj, g_b_proj).
        gate_activation: "sigmoid" or "silu".

    Example:
        >>> GDNConfig(num_heads=2, head_dim=8).state_bytes(context=1000, itemsize=2)
        800
    """

    kind: ClassVar[str] = "gdn"

    full_rank_gate: bool = False
    gate_activation: Literal["sigmoid", "silu"] = "sigmoid"

    def shapes(self, hidden_size: int) -> Shapes:
        """Return the shape of every parameter."""
        K, value = self.head_dim, self.value_channels
        if self.full_rank_gate:
            gate: Shapes = {"g_proj.weight": (value, hidden_size)}
        else:
            gate = {"g_a_proj.weight": (K, hidden_size), "g_b_proj.weight": (value, K)}
        decay: Shapes = {"a_proj.weight": (self.value_heads, hidden_size)}
        return {**self.shared_shapes(hidden_size, self.value_heads), **decay, **gate}
