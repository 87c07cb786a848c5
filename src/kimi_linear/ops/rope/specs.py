"""Named cases that tests and benchmarks share."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class RopeSpec:
    """One call of `apply_rope`."""

    name: str
    T: int
    B: int = 1
    H: int = 2
    K: int = 8
    start: int = 0
    theta: float = 10000.0
    # Whether each sequence of the batch has positions of its own.
    per_sequence: bool = False

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Return the keyword arguments of `apply_rope`, the same values for every dtype up to rounding."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.B, self.T, self.H, self.K, generator=generator, dtype=torch.float64)
        positions = torch.arange(self.start, self.start + self.T)
        if self.per_sequence:
            positions = positions + 3 * torch.arange(self.B)[:, None]
        return {"x": x.to(device, dtype), "positions": positions.to(device), "theta": self.theta}


SPECS = (
    RopeSpec("one_token", T=1),
    RopeSpec("shared_positions", T=7, B=2),
    RopeSpec("own_positions", T=7, B=3, per_sequence=True),
    RopeSpec("two_channels", T=5, K=2),
    RopeSpec("many_channels", T=19, B=2, H=3, K=70),
    RopeSpec("far_away", T=5, start=1_000_000, theta=500000.0),
    RopeSpec("empty", T=0),
)
