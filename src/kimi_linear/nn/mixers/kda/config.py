"""Configuration of Kimi Delta Attention. No torch."""

import dataclasses
from typing import ClassVar

from kimi_linear.base.errors import ConfigError
from kimi_linear.nn.component import Shapes
from kimi_linear.nn.mixers.delta.config import DeltaConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class KDAConfig(DeltaConfig):
    """Kimi Delta Attention (arXiv:2510.26692): one decay a key channel, low-rank gates, short convolutions.

    Decay, write strength and output gate live on the value heads. Both low-rank gates have rank `head_dim`, as in the
    released model. Sizes: see `DeltaConfig`.

    Args:
        gate_lower_bound: None for log_decay = -exp(A_log) softplus(z); a number in [-5, 0) for the bounded gate
            gate_lower_bound * sigmoid(exp(A_log) z). Another parameterisation, not a clamp.

    Example:
        >>> KDAConfig(num_heads=32, head_dim=128).parameters(2304)
        39514272
    """

    kind: ClassVar[str] = "kda"

    gate_lower_bound: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate_lower_bound is not None and not -5 <= self.gate_lower_bound < 0:
            raise ConfigError(
                f"kda: gate_lower_bound is {self.gate_lower_bound}, expected a number in [-5, 0), or None for the "
                "softplus gate."
            )

    def shapes(self, hidden_size: int) -> Shapes:
        """Return the shape of every parameter, named as in the released checkpoint."""
        K, decays = self.head_dim, self.value_heads * self.head_dim
        return {
            **self.shared_shapes(hidden_size, decays),
            "f_a_proj.weight": (K, hidden_size),
            "f_b_proj.weight": (decays, K),
            "g_a_proj.weight": (K, hidden_size),
            "g_b_proj.weight": (self.value_channels, K),
        }
