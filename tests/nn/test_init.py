import math

import pytest
import torch
from torch import Tensor, nn

from kimi_linear.nn.ffn import MoEConfig
from kimi_linear.nn.ffn.moe import MixtureOfExperts
from kimi_linear.nn.init import init_weights
from kimi_linear.nn.mixers import MIXERS, GDNConfig, KDAConfig, MixerConfig
from support.parts import MIXER_CASES

HIDDEN = 32
BIG = KDAConfig(num_heads=64, head_dim=16)


def build(config: MixerConfig, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MIXERS.build(config, HIDDEN).requires_grad_(False)


def softplus(x: Tensor) -> Tensor:
    return torch.nn.functional.softplus(x.double())


def test_decay_rates_are_log_uniform_between_1_and_16() -> None:
    rates = build(BIG).A_log.exp()
    assert 1.0 <= float(rates.min()) < 3.0
    assert 14.0 < float(rates.max()) <= 16.0


def test_the_bounded_gate_starts_at_rate_one() -> None:
    layer = build(KDAConfig(num_heads=4, head_dim=8, gate_lower_bound=-5.0))
    assert torch.equal(layer.A_log, torch.zeros(4))


def test_the_baseline_s_rates_reach_below_one() -> None:
    rates = build(GDNConfig(num_heads=256, head_dim=2)).A_log.exp()
    assert 0.0 < float(rates.min()) < 1.0
    assert float(rates.max()) <= 16.0


@pytest.mark.parametrize("config", [BIG, GDNConfig(num_heads=256, head_dim=2)], ids=["kda", "gdn"])
def test_time_steps_are_log_uniform_between_a_thousandth_and_a_tenth(config: MixerConfig) -> None:
    log_dt = softplus(build(config).dt_bias).log()
    low, high = math.log(1e-3), math.log(1e-1)
    assert low - 1e-4 <= float(log_dt.min()) < low + 0.2
    assert high - 0.2 < float(log_dt.max()) <= high + 1e-4
    assert abs(float(log_dt.mean()) - (low + high) / 2) < 0.2


def test_filters_are_uniform_like_a_convolution_of_torch() -> None:
    weight = build(BIG).q_conv1d.weight
    assert 0.49 < float(weight.abs().max()) <= 0.5
    assert abs(float(weight.std()) - 0.5 / math.sqrt(3)) < 0.01


def test_matrices_are_normal_with_the_given_deviation_and_norms_are_one() -> None:
    layer = build(BIG)
    init_weights(layer, std=0.1, generator=torch.Generator().manual_seed(0))
    assert abs(float(layer.q_proj.weight.std()) - 0.1) < 0.002
    assert torch.equal(layer.o_norm.weight, torch.ones(16))


def test_the_router_s_bias_starts_at_zero_and_its_counts_start_over() -> None:
    moe = MixtureOfExperts(MoEConfig(num_experts=4, top_k=2, intermediate_size=8), 16)
    moe(torch.randn(5, 16))
    nn.init.ones_(moe.gate.e_score_correction_bias)
    init_weights(moe)
    assert torch.equal(moe.gate.e_score_correction_bias, torch.zeros(4))
    assert moe.gate.expert_counts is None


def test_the_padding_row_of_an_embedding_is_zero() -> None:
    embedding = nn.Embedding(8, 4, padding_idx=3)
    init_weights(embedding, generator=torch.Generator().manual_seed(0))
    assert [float(row.abs().sum()) == 0 for row in embedding.weight.detach()] == [i == 3 for i in range(8)]


@pytest.mark.parametrize("config", MIXER_CASES.values(), ids=MIXER_CASES.keys())
def test_one_seed_gives_the_same_weights_also_from_the_meta_device(config: MixerConfig) -> None:
    direct = build(config)
    with torch.device("meta"):
        late = MIXERS.build(config, HIDDEN)
    late = late.to_empty(device="cpu")
    for parameter in late.parameters():
        nn.init.constant_(parameter, math.nan)
    for layer in (direct, late):
        init_weights(layer, generator=torch.Generator().manual_seed(7))
    other = build(config)
    init_weights(other, generator=torch.Generator().manual_seed(8))
    for (name, one), two, three in zip(direct.named_parameters(), late.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name
        assert one.ndim == 1 or not torch.equal(one, three), name
