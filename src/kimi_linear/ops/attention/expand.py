"""Keys and values of every head from MLA's latent."""

import torch
from torch import Tensor

from kimi_linear.ops.linear import linear


def expand_latent(
    latent: Tensor, key_rope: Tensor, kv_b: Tensor, H: int, nope_dim: int, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Return keys [B, S, H, dn + dr] and values [B, S, H, dv] of latents [B, S, R]; differentiable."""
    expanded = linear(latent, kv_b, backend=backend).unflatten(-1, (H, -1))
    k_nope, v = expanded[..., :nope_dim], expanded[..., nope_dim:]
    k = torch.cat([k_nope, key_rope[:, :, None].expand(-1, -1, H, -1)], dim=-1)
    return k, v
