"""Configuration of grouped-query attention. No torch."""

import dataclasses
from typing import ClassVar

from kimi_linear.base.errors import ConfigError
from kimi_linear.nn.component import Shapes, check_not_negative
from kimi_linear.nn.mixers.config import MixerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class GQAConfig(MixerConfig):
    """Causal softmax attention with shared key/value heads (arXiv:2305.13245).

    Args:
        num_heads: Query heads.
        num_kv_heads: Key/value heads, a divisor of num_heads.
        head_dim: Channels of a head.
        window: Tokens that one query sees, itself included; None for all. The state is then a ring of that many.
        rope_theta: Base of the rotary positions, or None for none.
        qk_norm: RMSNorm over the channels of each query and key head, before the rotation.
        norm_eps: Epsilon of those norms.

    Example:
        >>> GQAConfig(num_heads=4, num_kv_heads=2, head_dim=8, window=16).state_bytes(context=1000, itemsize=2)
        1024
    """

    kind: ClassVar[str] = "gqa"

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    rope_theta: float | None = None
    qk_norm: bool = False
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_heads", "num_kv_heads", "head_dim", "window")
        check_not_negative("gqa: norm_eps", self.norm_eps)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"gqa: num_kv_heads is {self.num_kv_heads}, expected a divisor of num_heads = {self.num_heads}."
            )
        if self.rope_theta is not None and self.head_dim % 2:
            raise ConfigError(f"gqa: head_dim is {self.head_dim}, expected an even number to rotate.")

    def shapes(self, hidden_size: int) -> Shapes:
        """Return the shape of every parameter."""
        d, Hq, Hkv, K = hidden_size, self.num_heads, self.num_kv_heads, self.head_dim
        norms: Shapes = {"q_norm.weight": (K,), "k_norm.weight": (K,)} if self.qk_norm else {}
        return {
            "q_proj.weight": (Hq * K, d),
            "k_proj.weight": (Hkv * K, d),
            "v_proj.weight": (Hkv * K, d),
            **norms,
            "o_proj.weight": (d, Hq * K),
        }

    def _seen(self, context: int) -> int:
        return context if self.window is None else min(context, self.window)

    def flops_per_token(self, hidden_size: int, context: int) -> int:
        """Return the forward FLOPs of one token."""
        attention = self._seen(context) * self.num_heads * 2 * self.head_dim
        return 2 * (self.weight_multiplies(hidden_size) + attention)

    def state_bytes(self, context: int, itemsize: int) -> int:
        """Return the bytes of one sequence's keys and values."""
        return self._seen(context) * self.num_kv_heads * 2 * self.head_dim * itemsize
