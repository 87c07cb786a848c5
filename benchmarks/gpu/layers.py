"""Contenders of a whole layer, forward and backward: Kimi Delta Attention, and latent attention through SDPA."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpu.delta import Contenders
from gpu.setting import Setting
from gpu.shapes import LATENT, ROPE, Layer
from kimi_linear.base import env
from kimi_linear.nn.mixers.kda import layer as kda_layer
from kimi_linear.nn.mixers.kda.config import KDAConfig
from kimi_linear.nn.mixers.kda.layer import KimiDeltaAttention
from kimi_linear.nn.mixers.mla.config import MLAConfig
from kimi_linear.nn.mixers.mla.layer import MultiHeadLatentAttention
from kimi_linear.ops.delta_rule import kda_core

KDA, KDA_CORE, KDA_PLAIN, MLA, MLA_PADDED = "KDA", "KDA core", "KDA plain", "MLA SDPA", "MLA SDPA padded"
# The plain layer keeps far more memory, and is slow.
PLAIN_TOKENS = 4096


def build(case: Layer, setting: Setting) -> tuple[KimiDeltaAttention, MultiHeadLatentAttention]:
    """Return both layers at the case's width, with the released model's latent."""
    full = case.head_dim == 128
    latent, rope = (LATENT, ROPE) if full else (16, 8)
    config = MLAConfig(
        num_heads=case.heads,
        kv_lora_rank=latent,
        qk_nope_head_dim=case.head_dim,
        qk_rope_head_dim=rope,
        v_head_dim=case.head_dim,
    )
    with torch.device(setting.device) if setting.device == "meta" else nullcontext():
        kda = KimiDeltaAttention(KDAConfig(num_heads=case.heads, head_dim=case.head_dim), case.width)
        mla = MultiHeadLatentAttention(config, case.width)
    dtype = getattr(torch, case.dtype)
    return kda.to(setting.device, dtype), mla.to(setting.device, dtype)


def padded(layer: MultiHeadLatentAttention, x: Tensor) -> Tensor:
    """Run latent attention with values as wide as keys, which SDPA's flash kernels ask for."""
    c = layer.config
    H, dn, dr, dv = c.num_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
    q = layer.q_proj(x).unflatten(-1, (H, dn + dr)).transpose(1, 2)
    latent, key_rope = layer.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, dr], dim=-1)
    k, v = layer.kv_b_proj(layer.kv_a_layernorm(latent)).unflatten(-1, (H, dn + dv)).split([dn, dv], dim=-1)
    k = torch.cat([k, key_rope.unsqueeze(2).expand(*key_rope.shape[:2], H, dr)], dim=-1).transpose(1, 2)
    v = F.pad(v, (0, dn + dr - dv)).transpose(1, 2)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True)[..., :dv]
    return layer.o_proj(o.transpose(1, 2).flatten(-2))


def both_ways(forward: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the output and the gradients of the input and of all weights."""
    y = forward(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], x.detach())]


def relative(x: Tensor, y: Tensor) -> float:
    """Return RMS(x - y) / RMS(y)."""
    x, y = x.detach().float(), y.detach().float()
    return float((x - y).norm() / y.norm())


def layer_contenders(case: Layer, setting: Setting, skip: tuple[str, ...] = ()) -> Contenders:
    """Build the contenders of a layer."""
    torch.manual_seed(0)
    found = Contenders(sets=setting.sets)
    kda, mla = build(case, setting)
    inputs = [setting.normal(1, case.T, case.width, dtype=case.dtype).requires_grad_() for _ in range(setting.sets)]

    def with_backend(name: str) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            with env.changed("KIMI_LINEAR_BACKEND", name):
                return kda(x)

        return forward

    def with_core(x: Tensor) -> Tensor:
        with mock.patch.object(kda_layer, "kda_core", partial(kda_core, backend=setting.ours)):
            return kda(x)

    # Every operator's kernels; the delta rule's alone; the layer as it comes.
    layers: dict[str, tuple[Callable[[Tensor], Tensor], Any]] = {
        KDA: (with_backend(setting.ours), kda),
        KDA_CORE: (with_core, kda),
        MLA: (mla, mla),
        MLA_PADDED: (lambda x: padded(mla, x), mla),
    }
    if case.T <= PLAIN_TOKENS:
        layers[KDA_PLAIN] = (kda, kda)
    for name, (forward, layer) in layers.items():
        if name not in skip:
            found.calls[name] = lambda index, f=forward, m=layer: both_ways(f, m, inputs[index % setting.sets])
    # Two forms of one layer in the same dtype, each with its own rounding, over several products.
    limit = 0.03 if case.dtype != "float32" else 1e-4
    if case.T <= PLAIN_TOKENS:
        for name in (KDA, KDA_CORE):
            found.checks[name] = lambda name=name: {"y": (compare(layers[name][0], kda, inputs[0]), limit)}
    found.checks[MLA_PADDED] = lambda: {"y": (compare(layers[MLA_PADDED][0], mla, inputs[0]), limit)}
    return found


def compare(form: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Return how far two forms of a layer are apart."""
    with torch.no_grad():
        return relative(form(x), plain(x))
