"""The sizes every delta-rule mixer has. No torch."""

import dataclasses
from typing import ClassVar

from kimi_linear.base.errors import ConfigError
from kimi_linear.nn.component import Shapes, check_not_negative
from kimi_linear.nn.mixers.config import MixerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaConfig(MixerConfig):
    """Heads and dims of a delta-rule mixer; a value head h reads query/key head h // (num_v_heads / num_heads).

    Args:
        num_heads: Query/key heads, H.
        head_dim: Key dim, K, and the rank of the low-rank gates.
        head_v_dim: Value dim, V. Default: head_dim.
        num_v_heads: Value heads, HV, a multiple of num_heads. Default: num_heads.
        conv_size: Taps of the causal depthwise convolutions, W.
        norm_eps: Epsilon of the output norm.
    """

    float32: ClassVar[frozenset[str]] = frozenset({"A_log", "dt_bias"})

    num_heads: int
    head_dim: int
    head_v_dim: int | None = None
    num_v_heads: int | None = None
    conv_size: int = 4
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_heads", "head_dim", "head_v_dim", "num_v_heads", "conv_size")
        check_not_negative(f"{self.kind}: norm_eps", self.norm_eps)
        if self.value_heads % self.num_heads:
            raise ConfigError(
                f"{self.kind}: num_v_heads is {self.num_v_heads}, expected a multiple of num_heads = {self.num_heads}."
            )

    @property
    def value_dim(self) -> int:
        """V."""
        return self.head_dim if self.head_v_dim is None else self.head_v_dim

    @property
    def value_heads(self) -> int:
        """HV."""
        return self.num_heads if self.num_v_heads is None else self.num_v_heads

    @property
    def key_channels(self) -> int:
        """H K."""
        return self.num_heads * self.head_dim

    @property
    def value_channels(self) -> int:
        """HV V."""
        return self.value_heads * self.value_dim

    def shared_shapes(self, hidden_size: int, num_decays: int) -> Shapes:
        """Return the shapes of the parameters all delta-rule mixers have, with `num_decays` decays in all."""
        key, value, HV = self.key_channels, self.value_channels, self.value_heads
        return {
            "q_proj.weight": (key, hidden_size),
            "k_proj.weight": (key, hidden_size),
            "v_proj.weight": (value, hidden_size),
            "q_conv1d.weight": (key, 1, self.conv_size),
            "k_conv1d.weight": (key, 1, self.conv_size),
            "v_conv1d.weight": (value, 1, self.conv_size),
            "A_log": (HV,),
            "dt_bias": (num_decays,),
            "b_proj.weight": (HV, hidden_size),
            "o_norm.weight": (self.value_dim,),
            "o_proj.weight": (hidden_size, value),
        }

    def flops_per_token(self, hidden_size: int, context: int) -> int:
        """Return the forward FLOPs of one token; the context does not matter."""
        recurrence = 3 * self.value_heads * self.head_dim * self.value_dim
        return 2 * (self.weight_multiplies(hidden_size) + recurrence)

    def state_bytes(self, context: int, itemsize: int) -> int:
        """Return the bytes of one sequence's recurrent state (at least float32) and convolution tails."""
        recurrent = max(4, itemsize) * self.value_heads * self.head_dim * self.value_dim
        return recurrent + itemsize * (self.conv_size - 1) * (2 * self.key_channels + self.value_channels)
