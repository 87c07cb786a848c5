"""Named cases that tests and benchmarks share. Letters as in api.py."""

from dataclasses import dataclass
from typing import Any

import torch

from kimi_linear.ops.moe.api import route


@dataclass(frozen=True)
class MoESpec:
    """One call of `grouped_mlp` on the choices of `route`."""

    name: str
    M: int
    E: int = 5
    k: int = 2
    D: int = 6
    F: int = 7
    # Experts whose selection bias keeps every token away.
    shunned: tuple[int, ...] = ()

    def route(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Return the keyword arguments of `route`, the same values for every dtype up to rounding."""
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(self.M, self.E, generator=generator, dtype=torch.float64).to(device, dtype)
        bias = torch.zeros(self.E)
        bias[list(self.shunned)] = -100.0
        return {"logits": logits, "bias": bias.to(device), "top_k": self.k}

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Return the keyword arguments of `grouped_mlp`; weights are float32 beside half-precision tokens."""
        generator = torch.Generator().manual_seed(seed)
        shapes = {"x": (self.M, self.D), "w1": (self.E, self.F, self.D), "w3": (self.E, self.F, self.D)}
        shapes["w2"] = (self.E, self.D, self.F)
        drawn = {name: torch.randn(s, generator=generator, dtype=torch.float64) for name, s in shapes.items()}
        weights, experts = route(**self.route(torch.float64, seed=seed + 1))
        return {
            **{name: (t if name == "x" else t * t.shape[-1] ** -0.5).to(device, dtype) for name, t in drawn.items()},
            "weights": weights.to(device, torch.float64 if dtype == torch.float64 else torch.float32),
            "experts": experts.to(device),
        }


SPECS = (
    # Few tokens are wide ones: the relative error of a handful of numbers says little in half precision.
    MoESpec("one_token", M=1, D=32, F=24),
    MoESpec("prime", M=13),
    MoESpec("one_choice", M=13, k=1),
    MoESpec("every_expert", M=7, k=5),
    MoESpec("unused_experts", M=13, shunned=(0, 3)),
    MoESpec("one_busy_expert", M=11, k=1, shunned=(0, 1, 3, 4)),
    MoESpec("more_experts_than_tokens", M=2, E=16, D=32, F=24),
    MoESpec("no_token", M=0),
)

# Sizes of the 297M-parameter model, for benchmarks alone.
BENCHMARK_SPECS = (MoESpec("prefill_4k", M=4096, E=16, k=4, D=1024, F=512),)
