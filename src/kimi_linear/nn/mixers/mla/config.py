"""Configuration of multi-head latent attention. No torch."""

import dataclasses
from typing import ClassVar

from kimi_linear.base.errors import ConfigError
from kimi_linear.nn.component import Shapes, check_not_negative
from kimi_linear.nn.mixers.config import MixerConfig

# The released model's reference code keeps its norm class's default here rather than the block norms' 1e-5.
LATENT_NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAConfig(MixerConfig):
    """Multi-head latent attention (arXiv:2405.04434) as Kimi Linear uses it: no query compression, no positions.

    Args:
        num_heads: Heads, H.
        kv_lora_rank: Latent width, R.
        qk_nope_head_dim: Query/key channels built from the latent.
        qk_rope_head_dim: Query/key channels shared by all heads; rotated only if rope_theta is given, never dropped.
        v_head_dim: Value dim, V.
        rope_theta: Base of the rotary positions, or None for none (the released model).
        latent_norm_eps: Epsilon of the latent's norm.

    Example:
        >>> MLAConfig(
        ...     num_heads=32, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        ... ).parameters(2304)
        29114880
    """

    kind: ClassVar[str] = "mla"

    num_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_theta: float | None = None
    latent_norm_eps: float = LATENT_NORM_EPS

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        check_not_negative("mla: latent_norm_eps", self.latent_norm_eps)
        if self.rope_theta is not None and self.qk_rope_head_dim % 2:
            raise ConfigError(f"mla: qk_rope_head_dim is {self.qk_rope_head_dim}, expected an even number to rotate.")

    @property
    def qk_head_dim(self) -> int:
        """Channels of one query head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def shapes(self, hidden_size: int) -> Shapes:
        """Return the shape of every parameter, named as in the released checkpoint."""
        d, H, R = hidden_size, self.num_heads, self.kv_lora_rank
        return {
            "q_proj.weight": (H * self.qk_head_dim, d),
            "kv_a_proj_with_mqa.weight": (R + self.qk_rope_head_dim, d),
            "kv_a_layernorm.weight": (R,),
            "kv_b_proj.weight": (H * (self.qk_nope_head_dim + self.v_head_dim), R),
            "o_proj.weight": (d, H * self.v_head_dim),
        }

    def flops_per_token(self, hidden_size: int, context: int) -> int:
        """Return the forward FLOPs of one token in the expanded form (training, prefill).

        The absorbed form of decoding spends 2 R + qk_rope_head_dim instead of qk_head_dim + v_head_dim multiply-adds a
        head on each token of the context, to read R + qk_rope_head_dim numbers instead of one key and value a head.
        """
        attention = context * self.num_heads * (self.qk_head_dim + self.v_head_dim)
        return 2 * (self.weight_multiplies(hidden_size) + attention)

    def state_bytes(self, context: int, itemsize: int) -> int:
        """Return the bytes of one sequence's latents and shared keys."""
        return context * (self.kv_lora_rank + self.qk_rope_head_dim) * itemsize
