"""Named cases that tests and benchmarks share. Letters as in api.py."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class LinearSpec:
    """One call of `linear`: x [*rows, K], weight [N, K]."""

    name: str
    rows: tuple[int, ...] = (13,)
    N: int = 37
    K: int = 29
    has_bias: bool = False

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Return the arguments of `linear`, the same values for every dtype up to rounding."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

        inputs = {"x": draw(*self.rows, self.K), "weight": draw(self.N, self.K)}
        return {**inputs, "bias": draw(self.N)} if self.has_bias else inputs


SPECS = (
    LinearSpec("plain"),
    LinearSpec("bias", has_bias=True),
    LinearSpec("batch", rows=(2, 3, 5), has_bias=True),
    LinearSpec("vector", rows=()),
    LinearSpec("one", rows=(1,), N=1, K=1),
    LinearSpec("no_row", rows=(0,)),
    LinearSpec("one_row", rows=(1,), N=64, K=128, has_bias=True),
    LinearSpec("whole_tiles", rows=(24,), N=64, K=64),
    LinearSpec("past_a_panel", rows=(3,), N=33, K=17, has_bias=True),
    LinearSpec("packed", rows=(53,), N=31, K=33),
    # More rows than are packed at a time, more inputs than a block of k.
    LinearSpec("blocks", rows=(197,), N=101, K=601, has_bias=True),
)

# Layers of small and middling models on a batch of tokens, for benchmarks alone.
BENCHMARK_SPECS = (
    LinearSpec("M2048_K256_N256", rows=(2048,), N=256, K=256),
    LinearSpec("M2048_K256_N768", rows=(2048,), N=768, K=256),
    LinearSpec("M2048_K256_N4096", rows=(2048,), N=4096, K=256),
    LinearSpec("M4096_K1024_N1024", rows=(4096,), N=1024, K=1024),
    LinearSpec("M4096_K1024_N4096", rows=(4096,), N=4096, K=1024),
)
