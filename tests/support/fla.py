"""Arguments for the functions of `kimi_linear.compat.fla`, by the functions' names."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.compat import fla

KDA = ("chunk_kda", "fused_recurrent_kda")
GDN = ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")
B, T, H, HV, K, V = 2, 70, 2, 4, 8, 6


def draw(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return q, k, v, a decay and a strength for a function."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k = (F.normalize(normal(B, T, H, K), dim=-1) for _ in range(2))
    g = F.logsigmoid(normal(B, T, HV, K))
    x = {
        "q": q,
        "k": k,
        "v": normal(B, T, HV, V),
        "g": g if name in KDA else g[..., 0],
        "beta": normal(B, T, HV).sigmoid(),
    }
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {name: y.to(wide if name == "g" else dtype) for name, y in x.items()}


def parameters(name: str) -> dict[str, Tensor]:
    """Return A_log and dt_bias for a function."""
    generator = torch.Generator().manual_seed(1)
    size = HV * K if name in KDA else HV
    return {"A_log": torch.rand(HV, generator=generator), "dt_bias": torch.randn(size, generator=generator)}


def call(name: str, *args: Any, **options: Any) -> Any:
    """Call a function by its name."""
    return getattr(fla, name)(*args, **options)


def assert_same(found: Any, expected: Any) -> None:
    """Compare float32 results that differ by a few roundings."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
