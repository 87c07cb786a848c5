"""Named cases that tests and benchmarks share. Letters as in api.py."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class GateSpec:
    """One call of `forget_gate`; K None is one decay a head. Logits are `scale` times normal."""

    name: str
    lead: tuple[int, ...] = (2, 5)
    HV: int = 3
    K: int | None = 4
    lower_bound: float | None = None
    has_rate: bool = True
    has_dt_bias: bool = True
    scale: float = 1.0

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Return the keyword arguments of `forget_gate`; A_log and dt_bias are float32, or float64 with float64 x."""
        generator = torch.Generator().manual_seed(seed)
        heads = (self.HV,) if self.K is None else (self.HV, self.K)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        x = torch.randn(*self.lead, *heads, generator=generator, dtype=torch.float64) * self.scale
        A_log = torch.rand(self.HV, generator=generator, dtype=torch.float64) * 4 - 2
        dt_bias = torch.randn(self.HV * (self.K or 1), generator=generator, dtype=torch.float64)
        return {
            "x": x.to(device, dtype),
            "A_log": A_log.to(device, wide) if self.has_rate else None,
            "dt_bias": dt_bias.to(device, wide) if self.has_dt_bias else None,
            "lower_bound": self.lower_bound,
        }


SPECS = (
    GateSpec("softplus"),
    GateSpec("bounded", lower_bound=-5.0),
    GateSpec("bounded_without_rate", lower_bound=-5.0, has_rate=False),
    GateSpec("bounded_without_rate_or_bias", lower_bound=-2.0, has_rate=False, has_dt_bias=False),
    GateSpec("softplus_without_bias", has_dt_bias=False),
    GateSpec("softplus_extreme", scale=50.0),
    GateSpec("bounded_extreme", scale=8.0, lower_bound=-5.0),
    GateSpec("scalar", K=None),
    GateSpec("scalar_bounded", K=None, lower_bound=-5.0),
    GateSpec("scalar_one_token", K=None, lead=(2, 1)),
    GateSpec("decode", lead=(7,)),
    GateSpec("one_head", HV=1, lead=(3, 1), K=8),
    GateSpec("one_channel", K=1),
    GateSpec("many_tokens", lead=(300,), K=21),
    GateSpec("many_tokens_bounded", lead=(300,), K=21, lower_bound=-5.0),
    GateSpec("no_token", lead=(1, 0)),
    GateSpec("no_lead", lead=()),
)

# A layer of the released model, for benchmarks alone.
BENCHMARK_SPECS = (GateSpec("prefill_4k", lead=(1, 4096), HV=32, K=128),)
