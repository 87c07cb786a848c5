"""The delta-rule layers against the equations written out token by token, and their special cases."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kimi_linear.base.numerics import relative_error, tolerance
from kimi_linear.nn.mixers import MIXERS, GDNConfig, KDAConfig, MixerConfig
from kimi_linear.nn.state import KDAState

HIDDEN, T = 12, 9


def build(config: MixerConfig) -> nn.Module:
    torch.manual_seed(0)
    layer = MIXERS.build(config, HIDDEN).double()
    # Away from the values at which a wrong formula could hide.
    for name, parameter in layer.named_parameters():
        if name.endswith(("A_log", "dt_bias", "o_norm.weight")):
            nn.init.normal_(parameter)
        elif "conv" not in name:
            nn.init.normal_(parameter, std=0.5)
    return layer.requires_grad_(False)


def inputs() -> Tensor:
    return torch.randn(1, T, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def convolved(layer: nn.Module, name: str, x: Tensor, heads: int) -> Tensor:
    """Return silu(conv(W x)) of one row, [T, heads, dim], by the sum over taps."""
    u = getattr(layer, f"{name}_proj")(x[0])
    taps = getattr(layer, f"{name}_conv1d").weight[:, 0]
    size = taps.shape[1]
    y = torch.zeros_like(u)
    for t, j in itertools.product(range(T), range(size)):
        if t - size + 1 + j >= 0:
            y[t] += taps[:, j] * u[t - size + 1 + j]
    return F.silu(y).unflatten(-1, (heads, -1))


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def recurrence(layer: nn.Module, x: Tensor, log_decay: Tensor) -> Tensor:
    """Return o [T, HV, V] for log_decay [T, HV, K], decaying first, writing, then reading."""
    c = layer.config
    q, k = (unit(convolved(layer, name, x, c.num_heads)) for name in ("q", "k"))
    v = convolved(layer, "v", x, c.value_heads)
    beta = layer.b_proj(x[0]).sigmoid()
    o = torch.zeros(T, c.value_heads, c.value_dim, dtype=x.dtype)
    for h in range(c.value_heads):
        source = h // (c.value_heads // c.num_heads)
        state = torch.zeros(c.head_dim, c.value_dim, dtype=x.dtype)
        for t in range(T):
            state = log_decay[t, h].exp()[:, None] * state
            error = v[t, h] - state.T @ k[t, source]
            state = state + beta[t, h] * torch.outer(k[t, source], error)
            o[t, h] = state.T @ (q[t, source] * c.head_dim**-0.5)
    return o


def finished(layer: nn.Module, o: Tensor, gate: Tensor, activation: str) -> Tensor:
    normed = o / (o.square().mean(-1, keepdim=True) + layer.config.norm_eps).sqrt() * layer.o_norm.weight
    gate = gate.view_as(o)
    opened = gate.sigmoid() if activation == "sigmoid" else F.silu(gate)
    return layer.o_proj((normed * opened).flatten(1))[None]


KDA_CONFIGS = {
    "released form": KDAConfig(num_heads=2, head_dim=4),
    "grouped, V != K": KDAConfig(num_heads=2, head_dim=4, num_v_heads=6, head_v_dim=3, conv_size=2),
    "bounded gate": KDAConfig(num_heads=2, head_dim=4, gate_lower_bound=-2.5),
    "one tap": KDAConfig(num_heads=2, head_dim=4, conv_size=1),
}


@pytest.mark.parametrize("config", KDA_CONFIGS.values(), ids=KDA_CONFIGS.keys())
def test_kimi_delta_attention_follows_its_equations(config: KDAConfig) -> None:
    layer, x = build(config), inputs()
    logits = layer.f_b_proj(layer.f_a_proj(x[0])) + layer.dt_bias
    logits = logits.unflatten(-1, (config.value_heads, config.head_dim))
    rate = layer.A_log.exp()[:, None]
    if config.gate_lower_bound is None:
        log_decay = -rate * F.softplus(logits)
    else:
        log_decay = config.gate_lower_bound * (rate * logits).sigmoid()
    o = recurrence(layer, x, log_decay)
    expected = finished(layer, o, layer.g_b_proj(layer.g_a_proj(x[0])), "sigmoid")
    assert relative_error(layer(x), expected) <= tolerance(torch.float64).output


GDN_CONFIGS = {
    "baseline": GDNConfig(num_heads=2, head_dim=4),
    "paper": GDNConfig(
        num_heads=2, head_dim=4, num_v_heads=4, head_v_dim=3, full_rank_gate=True, gate_activation="silu"
    ),
}


@pytest.mark.parametrize("config", GDN_CONFIGS.values(), ids=GDN_CONFIGS.keys())
def test_gated_deltanet_follows_its_equations(config: GDNConfig) -> None:
    layer, x = build(config), inputs()
    log_decay = -layer.A_log.exp() * F.softplus(layer.a_proj(x[0]) + layer.dt_bias)
    o = recurrence(layer, x, log_decay[..., None].expand(-1, -1, config.head_dim))
    gate = layer.g_proj(x[0]) if config.full_rank_gate else layer.g_b_proj(layer.g_a_proj(x[0]))
    assert relative_error(layer(x), finished(layer, o, gate, config.gate_activation)) <= tolerance(torch.float64).output


def test_kimi_delta_attention_with_equal_channels_is_gated_deltanet() -> None:
    gdn = build(GDNConfig(num_heads=2, head_dim=4))
    kda = build(KDAConfig(num_heads=2, head_dim=4))
    shared = {
        name: tensor for name, tensor in gdn.state_dict().items() if name in kda.state_dict() and name != "dt_bias"
    }
    kda.load_state_dict(shared, strict=False)
    # Rank 4 holds the two heads' decay logits, repeated over the channels of each head.
    kda.f_a_proj.weight.zero_()[:2] = gdn.a_proj.weight
    kda.f_b_proj.weight.zero_()
    for head in range(2):
        kda.f_b_proj.weight[4 * head : 4 * head + 4, head] = 1.0
    kda.dt_bias.copy_(gdn.dt_bias.repeat_interleave(4))
    x = inputs()
    assert relative_error(kda(x), gdn(x)) <= tolerance(torch.float64).output


def test_grouped_value_heads_equal_repeated_key_heads() -> None:
    grouped = build(KDAConfig(num_heads=2, head_dim=4, num_v_heads=4))
    plain = build(KDAConfig(num_heads=4, head_dim=4))
    state = dict(grouped.state_dict())
    for name in ("q_proj", "k_proj", "q_conv1d", "k_conv1d"):
        weight = state[f"{name}.weight"]
        state[f"{name}.weight"] = weight.unflatten(0, (2, 4)).repeat_interleave(2, dim=0).flatten(0, 1)
    plain.load_state_dict(state)
    x = inputs()
    assert relative_error(grouped(x), plain(x)) <= tolerance(torch.float64).output


def test_the_state_holds_the_last_inputs_of_the_convolutions_and_a_float32_memory() -> None:
    layer = MIXERS.build(KDAConfig(num_heads=2, head_dim=4), HIDDEN).bfloat16()
    x = inputs().bfloat16()
    state = layer.new_state(1, device=x.device, dtype=x.dtype)
    assert isinstance(state, KDAState)
    with torch.no_grad():
        layer(x, state)
        expected = layer.q_proj(x)[:, -3:].mT
    assert torch.equal(state.conv_q, expected)
    assert state.conv_v.dtype == torch.bfloat16
    assert state.recurrent.dtype == torch.float32
    assert state.recurrent.shape == (1, 2, 4, 4)


def test_single_token_updates_write_into_the_same_memory() -> None:
    layer = build(KDAConfig(num_heads=2, head_dim=4))
    x = inputs()
    state = layer.new_state(1, device=x.device, dtype=x.dtype)
    with torch.no_grad():
        layer(x, state)
        places = {name: tensor.data_ptr() for name, tensor in state.tensors().items()}
        layer(x[:, :1], state)
    assert {name: tensor.data_ptr() for name, tensor in state.tensors().items()} == places
