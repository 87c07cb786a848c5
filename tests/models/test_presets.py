"""Every preset, built on the meta device: predicted counts are those of the module."""

import dataclasses

import pytest
import torch

from kimi_linear.base.errors import ConfigError
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.models.kimi_linear.model import KimiLinearLM
from kimi_linear.models.kimi_linear.presets import PRESETS, SIZES, build_size, preset
from kimi_linear.nn.placement import to_lists
from support.flops import measured_flops

RELEASED = preset("48b-a3b")
STUDY = {
    "scaling-653m": (653e6, 16, 1216),
    "scaling-878m": (878e6, 18, 1376),
    "scaling-1.1b": (1.1e9, 20, 1536),
    "scaling-1.4b": (1.4e9, 22, 1632),
    "scaling-1.7b": (1.7e9, 24, 1776),
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_predicts_parameters_state_and_flops_of_its_module(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = preset(name)
    # The backends whose operators are opaque on every device, so that their shapes are counted.
    monkeypatch.setenv("KIMI_LINEAR_BACKEND", "reference")
    with torch.device("meta"):
        model = KimiLinearLM(config).bfloat16()
        ids = torch.zeros(3, 5, dtype=torch.int64)
        cache = model.new_cache(3)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == config.shapes()
    assert sum(p.numel() for p in model.parameters()) == config.parameters()
    assert cache.nbytes == 3 * config.state_bytes(0, 2)
    flops = measured_flops(lambda: model(ids, cache=cache))
    assert flops == 3 * sum(config.flops_per_token(context) for context in range(1, 6))
    assert cache.nbytes == 3 * config.state_bytes(5, 2)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_plain_values(name: str) -> None:
    assert KimiLinearConfig.from_dict(preset(name).to_dict()) == preset(name)


def test_the_released_model_has_its_published_counts() -> None:
    assert RELEASED.parameters() == 49_122_681_728
    assert RELEASED.active_parameters(head=False) == 2_729_485_184
    assert RELEASED.active_parameters() == 3_106_972_544
    assert RELEASED.active_parameters(embedding=True) == 3_484_459_904
    experts = sum(b.ffn.num_experts * 3 * 2304 * 1024 for b in RELEASED.layer_blocks if b.ffn.kind == "moe")
    assert experts == 47_110_422_528


def test_the_released_model_has_its_published_placement() -> None:
    assert [i for i, block in enumerate(RELEASED.layer_blocks) if block.mixer.kind == "mla"] == [
        3,
        7,
        11,
        15,
        19,
        23,
        26,
    ]
    assert [i for i, block in enumerate(RELEASED.layer_blocks) if block.ffn.kind == "swiglu"] == [0]
    assert to_lists(RELEASED.layers)["kda_dense"] == [1]


def test_the_released_model_remembers_its_published_bytes() -> None:
    assert RELEASED.state_bytes(0, 2) == 43_417_600
    assert RELEASED.state_bytes(1, 2) - RELEASED.state_bytes(0, 2) == 8_064
    assert RELEASED.state_bytes(1_048_576, 2) == int(7.875 * 2**30) + 43_417_600
    full = preset("48b-a3b-mla")
    assert full.state_bytes(1, 2) == 31_104
    # The hybrid is the smaller one from here on.
    assert RELEASED.state_bytes(1884, 2) > full.state_bytes(1884, 2)
    assert RELEASED.state_bytes(1885, 2) < full.state_bytes(1885, 2)


@pytest.mark.parametrize("name", STUDY)
def test_the_scaling_study_has_its_published_sizes_and_active_parameters(name: str) -> None:
    config = preset(name)
    active, layers, hidden = STUDY[name]
    assert config.num_layers == layers
    assert config.hidden_size == hidden
    assert {b.mixer.num_heads for b in config.layer_blocks} == {layers}
    assert {(b.ffn.top_k, b.ffn.num_experts) for b in config.layer_blocks if b.ffn.kind == "moe"} == {(8, 64)}
    assert config.active_parameters() == pytest.approx(active, rel=0.004)


@pytest.mark.parametrize("name", STUDY)
def test_no_other_expert_width_comes_nearer_the_study_s_active_parameters(name: str) -> None:
    size = SIZES[name]

    def distance(width: int) -> float:
        moe = dataclasses.replace(size.moe, intermediate_size=width)
        return abs(
            build_size(dataclasses.replace(size, moe=moe, dense_width=9 * width)).active_parameters() - STUDY[name][0]
        )

    chosen = size.moe.intermediate_size
    assert distance(chosen) == min(distance(chosen + step) for step in (-8, 0, 8))


@pytest.mark.parametrize(("name", "total"), [("150m", 150e6), ("300m", 300e6), ("1b", 1e9)])
def test_small_models_are_as_large_as_their_names(name: str, total: float) -> None:
    assert preset(name).parameters() == pytest.approx(total, rel=0.02)


@pytest.mark.parametrize("name", SIZES)
def test_the_baselines_differ_in_the_linear_layers_only(name: str) -> None:
    hybrid, gdn, mla = (preset(name + suffix) for suffix in ("", "-gdn", "-mla"))
    assert {b.mixer.kind for b in hybrid.layer_blocks} == {"kda", "mla"}
    assert {b.mixer.kind for b in gdn.layer_blocks} == {"gdn", "mla"}
    assert {b.mixer.kind for b in mla.layer_blocks} == {"mla"}
    for other in (gdn, mla):
        assert [b.ffn for b in other.layer_blocks] == [b.ffn for b in hybrid.layer_blocks]
        for one, two in zip(hybrid.layer_blocks, other.layer_blocks, strict=True):
            assert one.mixer.kind == "kda" or one.mixer == two.mixer
        assert (other.vocab_size, other.hidden_size) == (hybrid.vocab_size, hybrid.hidden_size)


def test_an_unknown_preset_names_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="did you mean '48b-a3b'"):
        preset("48b-a3")
    with pytest.raises(ConfigError, match="unknown variant 'gdm'"):
        build_size(SIZES["tiny"], "gdm")
