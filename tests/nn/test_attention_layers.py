"""The softmax mixers against the equations written out, and their special cases."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from kimi_linear.base.numerics import relative_error, tolerance
from kimi_linear.nn.mixers import MIXERS, GQAConfig, MixerConfig, MLAConfig
from kimi_linear.nn.state import MLAState

HIDDEN, T = 12, 9
MLA = MLAConfig(num_heads=3, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)


def build(config: MixerConfig) -> nn.Module:
    torch.manual_seed(0)
    layer = MIXERS.build(config, HIDDEN).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer.requires_grad_(False)


def inputs(batch: int = 2) -> Tensor:
    return torch.randn(batch, T, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def softmax_attention(scores: Tensor, v: Tensor, window: int = T) -> Tensor:
    """Return o [B, T, H, V] from scores [B, H, T, S] and v [B, S, H, V]; each token sees `window` tokens back."""
    t, s = torch.arange(T)[:, None], torch.arange(T)[None]
    hidden = (s > t) | (s <= t - window)
    return torch.einsum("bhts,bshv->bthv", scores.masked_fill(hidden, -math.inf).softmax(-1), v)


def rotated(x: Tensor, theta: float) -> Tensor:
    """Rotate the halves of x [B, T, H, K] by position, as complex numbers."""
    half = x.shape[-1] // 2
    angles = torch.arange(T, dtype=x.dtype)[:, None] * theta ** (-torch.arange(half, dtype=x.dtype) / half)
    turned = torch.complex(*x.split(half, dim=-1)) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


@pytest.mark.parametrize("theta", [None, 100.0], ids=["no positions", "rotary"])
def test_latent_attention_follows_its_equations(theta: float | None) -> None:
    layer, x = build(dataclasses.replace(MLA, rope_theta=theta)), inputs()
    q = layer.q_proj(x).unflatten(-1, (3, 10))
    q_nope, q_rope = q[..., :6], q[..., 6:]
    latent, key_rope = layer.kv_a_proj_with_mqa(x).split([10, 4], dim=-1)
    latent = latent / (latent.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.kv_a_layernorm.weight
    if theta is not None:
        q_rope, key_rope = rotated(q_rope, theta), rotated(key_rope[:, :, None], theta)[:, :, 0]
    k, v = layer.kv_b_proj(latent).unflatten(-1, (3, 11)).split([6, 5], dim=-1)
    scores = torch.einsum("bthk,bshk->bhts", q_nope, k) + torch.einsum("bthr,bsr->bhts", q_rope, key_rope)
    expected = layer.o_proj(softmax_attention(scores / math.sqrt(10), v).flatten(-2))
    assert relative_error(layer(x), expected) <= tolerance(torch.float64).output


@pytest.mark.parametrize(
    "config",
    [
        GQAConfig(num_heads=4, num_kv_heads=4, head_dim=6),
        GQAConfig(num_heads=4, num_kv_heads=1, head_dim=6),
        GQAConfig(num_heads=4, num_kv_heads=2, head_dim=6, window=3, rope_theta=100.0, qk_norm=True),
    ],
    ids=["multi-head", "multi-query", "all options"],
)
def test_grouped_query_attention_follows_its_equations(config: GQAConfig) -> None:
    layer, x = build(config), inputs()
    q, k, v = (p(x).unflatten(-1, (-1, 6)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    if config.qk_norm:
        q = q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.q_norm.weight
        k = k / (k.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.k_norm.weight
    if config.rope_theta is not None:
        q, k = rotated(q, config.rope_theta), rotated(k, config.rope_theta)
    k, v = (x.repeat_interleave(4 // config.num_kv_heads, dim=2) for x in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(6)
    expected = layer.o_proj(softmax_attention(scores, v, config.window or T).flatten(-2))
    assert relative_error(layer(x), expected) <= tolerance(torch.float64).output


def test_a_window_as_long_as_the_prompt_is_full_attention() -> None:
    full, x = GQAConfig(num_heads=4, num_kv_heads=2, head_dim=6, rope_theta=1e4), inputs()
    expected = build(full)(x)
    assert relative_error(build(dataclasses.replace(full, window=T))(x), expected) <= tolerance(torch.float64).output
    assert relative_error(build(dataclasses.replace(full, window=T - 1))(x), expected) > 1e-3


def test_a_window_of_one_returns_the_token_s_own_value() -> None:
    layer, x = build(GQAConfig(num_heads=2, num_kv_heads=2, head_dim=6, window=1)), inputs()
    assert relative_error(layer(x), layer.o_proj(layer.v_proj(x))) <= tolerance(torch.float64).output


def test_multi_head_attention_is_a_case_of_latent_attention() -> None:
    """With a latent as wide as the input and no shared key part, its keys and values are those of any heads."""
    mla = build(MLAConfig(num_heads=2, kv_lora_rank=HIDDEN, qk_nope_head_dim=6, qk_rope_head_dim=2, v_head_dim=6))
    mla.kv_a_proj_with_mqa.weight.zero_()[:HIDDEN] = torch.eye(HIDDEN)
    mla.kv_a_layernorm.weight.fill_(1.0)
    gqa = build(GQAConfig(num_heads=2, num_kv_heads=2, head_dim=6))
    # The unused shared part still widens the scale's root: sqrt(8) instead of sqrt(6).
    gqa.q_proj.weight.copy_(mla.q_proj.weight.unflatten(0, (2, 8))[:, :6].flatten(0, 1) * math.sqrt(6 / 8))
    k, v = mla.kv_b_proj.weight.unflatten(0, (2, 12)).split([6, 6], dim=1)
    gqa.k_proj.weight.copy_(k.flatten(0, 1))
    gqa.v_proj.weight.copy_(v.flatten(0, 1))
    gqa.o_proj.weight.copy_(mla.o_proj.weight)
    # Inputs of unit mean square, and no epsilon, which the latent's norm leaves as they are.
    mla.kv_a_layernorm.eps = 0.0
    x = inputs()
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    assert relative_error(mla(x), gqa(x)) <= tolerance(torch.float64).output


@torch.no_grad()
def test_absorbed_single_tokens_equal_the_expanded_prompt() -> None:
    layer, x = build(MLA), inputs()
    state = layer.new_state(2, device=x.device, dtype=x.dtype)
    absorbed = torch.cat([layer(x[:, t : t + 1], state) for t in range(T)], dim=1)
    assert relative_error(absorbed, layer(x)) <= tolerance(torch.float64).output


@torch.no_grad()
def test_the_latent_state_holds_latents_after_the_norm() -> None:
    layer, x = build(MLA), inputs()
    state = layer.new_state(2, device=x.device, dtype=x.dtype)
    assert isinstance(state, MLAState)
    layer(x, state)
    latent, key_rope = layer.kv_a_proj_with_mqa(x).split([10, 4], dim=-1)
    assert torch.equal(state.latent[:, :T], layer.kv_a_layernorm(latent))
    assert torch.equal(state.key_rope[:, :T], key_rope)
