"""Keys and values of every head from MLA's latent."""

import torch
import torch.nn.functional as F
from torch import Tensor


def expand_latent(latent: Tensor, key_rope: Tensor, kv_b: Tensor, H: int, nope_dim: int) -> tuple[Tensor, Tensor]:
    """Return keys [B, S, H, dn + dr] and values [B, S, H, dv] of latents [B, S, R]; differentiable."""
    expanded = F.linear(latent, kv_b).unflatten(-1, (H, -1))
    k_nope, v = expanded[..., :nope_dim], expanded[..., nope_dim:]
    k = torch.cat([k_nope, key_rope[:, :, None].expand(-1, -1, H, -1)], dim=-1)
    return k, v
