"""Counts of the parts of the released model, and what their configurations refuse."""

import dataclasses
from typing import Any

import pytest

from kimi_linear.base.errors import ConfigError
from kimi_linear.nn.config import BlockConfig
from kimi_linear.nn.ffn import FFNS, MoEConfig, SwiGLUConfig
from kimi_linear.nn.mixers import MIXERS, GDNConfig, GQAConfig, KDAConfig, MixerConfig, MLAConfig
from support.parts import FFN_CASES, MIXER_CASES

D = 2304
KDA = KDAConfig(num_heads=32, head_dim=128)
MLA = MLAConfig(num_heads=32, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
MOE = MoEConfig(num_experts=256, top_k=8, intermediate_size=1024, scaling=2.446)
DENSE = SwiGLUConfig(intermediate_size=9216)


@pytest.mark.parametrize(
    ("part", "parameters", "active"),
    [
        (KDA, 39_514_272, 39_514_272),
        (MLA, 29_114_880, 29_114_880),
        (DENSE, 63_700_992, 63_700_992),
        (MOE, 1_819_607_296, 64_291_072),
        (BlockConfig(mixer=KDA, ffn=DENSE), 103_219_872, 103_219_872),
        (BlockConfig(mixer=KDA, ffn=MOE), 1_859_126_176, 103_809_952),
        (BlockConfig(mixer=MLA, ffn=MOE), 1_848_726_784, 93_410_560),
    ],
    ids=["kda", "mla", "dense", "moe", "kda+dense", "kda+moe", "mla+moe"],
)
def test_the_released_parts_have_their_published_counts(part: Any, parameters: int, active: int) -> None:
    assert part.parameters(D) == parameters
    assert part.active_parameters(D) == active


def test_the_released_parts_remember_their_published_bytes() -> None:
    assert KDA.state_bytes(1, 2) == KDA.state_bytes(1_000_000, 2) == 2_097_152 + 73_728
    assert MLA.state_bytes(1, 2) == 1_152
    assert MLA.state_bytes(1000, 2) == 1_152_000


def test_a_window_bounds_bytes_and_flops() -> None:
    full = GQAConfig(num_heads=4, num_kv_heads=2, head_dim=8)
    ring = dataclasses.replace(full, window=10)
    assert ring.state_bytes(10, 2) == full.state_bytes(10, 2) == ring.state_bytes(1000, 2)
    assert ring.flops_per_token(16, 10) == full.flops_per_token(16, 10) == ring.flops_per_token(16, 1000)


@pytest.mark.parametrize("config", [*MIXER_CASES.values(), *FFN_CASES.values()], ids=[*MIXER_CASES, *FFN_CASES])
def test_a_part_survives_plain_values(config: MixerConfig) -> None:
    table = MIXERS if config.kind in MIXERS else FFNS
    assert table.config_from_dict(config.to_dict(), "part") == config


def test_a_block_survives_plain_values() -> None:
    block = BlockConfig(mixer=KDA, ffn=MOE)
    assert BlockConfig.from_dict(block.to_dict()) == block


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixer": {"kind": "kdaa", "num_heads": 1, "head_dim": 8}}, "unknown mixer 'kdaa': did you mean 'kda'"),
        ({"mixer": {"num_heads": 1, "head_dim": 8}}, "block.mixer has no 'kind'"),
        ({"mixer": {"kind": "kda", "num_head": 1, "head_dim": 8}}, "did you mean 'num_heads'"),
        ({"mixer": {"kind": "kda", "head_dim": 8}}, "'num_heads' is missing"),
        ({"ffn": {"kind": "swiglu", "intermediate_size": 0}}, "at least 1"),
        ({"fnn": {}}, "did you mean 'ffn'"),
    ],
)
def test_wrong_plain_values_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    plain = BlockConfig(mixer=KDAConfig(num_heads=1, head_dim=8), ffn=SwiGLUConfig(intermediate_size=4)).to_dict()
    with pytest.raises(ConfigError, match=message):
        BlockConfig.from_dict({**plain, **change})


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (KDAConfig, {"num_heads": 3, "head_dim": 8, "num_v_heads": 4}, "multiple of num_heads = 3"),
        (KDAConfig, {"num_heads": 2, "head_dim": 8, "gate_lower_bound": 0.0}, r"\[-5, 0\)"),
        (KDAConfig, {"num_heads": 2, "head_dim": 8, "gate_lower_bound": -6.0}, r"\[-5, 0\)"),
        (KDAConfig, {"num_heads": "2", "head_dim": 8}, "whole number"),
        (KDAConfig, {"num_heads": 2, "head_dim": 8, "conv_size": 0}, "conv_size is 0"),
        (GDNConfig, {"num_heads": 2, "head_dim": 8, "gate_activation": "relu"}, "'sigmoid' or 'silu'"),
        (GQAConfig, {"num_heads": 4, "num_kv_heads": 3, "head_dim": 8}, "divisor of num_heads = 4"),
        (GQAConfig, {"num_heads": 4, "num_kv_heads": 2, "head_dim": 7, "rope_theta": 1e4}, "even"),
        (GQAConfig, {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "window": 0}, "window is 0"),
        (MoEConfig, {"num_experts": 4, "top_k": 5, "intermediate_size": 8}, "at most num_experts = 4"),
        (MoEConfig, {"num_experts": 4, "top_k": 2, "intermediate_size": 8, "activation": "tanh"}, "'softmax'"),
        (MoEConfig, {"num_experts": 4, "top_k": 2, "intermediate_size": 8, "num_shared_experts": -1}, "at least 0"),
        (SwiGLUConfig, {"intermediate_size": 1.5}, "whole number"),
    ],
)
def test_contradictory_fields_are_refused(cls: type, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cls(**fields)


def test_an_odd_rotated_part_of_latent_attention_is_refused() -> None:
    with pytest.raises(ConfigError, match="even"):
        dataclasses.replace(MLA, qk_rope_head_dim=63, rope_theta=1e4)
