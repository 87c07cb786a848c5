"""Named cases that tests and benchmarks share: one case serves all three norms. Letters as in api.py."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class NormSpec:
    """Rows of the size of the last axis of `shape`; `scale` multiplies x, every third row is zero with `zero_rows`."""

    name: str
    shape: tuple[int, ...]
    scale: float = 1.0
    zero_rows: bool = False
    activation: str = "sigmoid"

    def _draw(self, dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x, gate, weight = (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in (self.shape, self.shape, self.shape[-1:])
        )
        x = x * self.scale
        if self.zero_rows:
            x.view(-1, x.shape[-1])[::3] = 0
        return x.to(device, dtype), gate.to(device, dtype), (weight + 1).to(device, dtype)

    def rms_norm(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Return the keyword arguments of `rms_norm`, the same values for every dtype up to rounding."""
        x, _, weight = self._draw(dtype, device, seed)
        return {"x": x, "weight": weight, "eps": 1e-5}

    def gated_rms_norm(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Return the keyword arguments of `gated_rms_norm`."""
        x, gate, weight = self._draw(dtype, device, seed)
        return {"x": x, "gate": gate, "weight": weight, "eps": 1e-5, "activation": self.activation}

    def l2_norm(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Return the keyword arguments of `l2_norm`."""
        return {"x": self._draw(dtype, device, seed)[0], "eps": 1e-6}


SPECS = (
    NormSpec("one_row", (7,)),
    # One channel of ordinary size is its sign: the gradient cancels to nothing. Here the epsilon matters too.
    NormSpec("one_channel", (5, 1), scale=1e-3),
    NormSpec("matrix", (13, 24), activation="silu"),
    NormSpec("heads", (2, 5, 3, 16)),
    NormSpec("heads_silu", (2, 5, 3, 16), activation="silu"),
    NormSpec("wide", (3, 513)),
    NormSpec("many_rows", (2, 150, 19), activation="silu"),
    NormSpec("no_row", (0, 8)),
    NormSpec("large", (4, 16), scale=1e3),
    # Small enough for the epsilon to matter.
    NormSpec("small", (4, 16), scale=1e-2),
    NormSpec("zero_rows", (7, 16), zero_rows=True),
)

# The width of a model and the heads of a layer, for benchmarks alone.
BENCHMARK_SPECS = (NormSpec("model_4k", (4096, 2304)), NormSpec("heads_4k", (1, 4096, 32, 128)))
