"""Named cases that tests and benchmarks share."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SwiGLUSpec:
    """One call of `swiglu`; gates are `scale` times normal."""

    name: str
    shape: tuple[int, ...]
    scale: float = 1.0

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
        """Return the keyword arguments of `swiglu`."""
        generator = torch.Generator().manual_seed(seed)
        gate, up = torch.randn(2, *self.shape, generator=generator, dtype=torch.float64)
        return {"gate": (gate * self.scale).to(device, dtype), "up": up.to(device, dtype)}


SPECS = (
    SwiGLUSpec("vectors", (3, 64)),
    SwiGLUSpec("prime", (7, 13)),
    # Longer than a thread's piece, with a ragged end.
    SwiGLUSpec("pieces", (5, 8193)),
    SwiGLUSpec("saturated", (4, 33), scale=30.0),
    SwiGLUSpec("one", (1,)),
    SwiGLUSpec("no_axes", ()),
    SwiGLUSpec("empty", (2, 0, 8)),
)

# The first layer of the 297M-parameter model, for benchmarks alone.
BENCHMARK_SPECS = (SwiGLUSpec("prefill_4k", (4096, 2048)),)
