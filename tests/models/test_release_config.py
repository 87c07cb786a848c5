"""The released model type's configuration, there and back, and what is refused."""

import dataclasses
import json
from typing import Any

import pytest

from kimi_linear.base.errors import ConfigError
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.models.kimi_linear.presets import SIZES, preset
from kimi_linear.models.kimi_linear.release_config import from_release_config, to_release_config, unknown_keys
from kimi_linear.models.kimi_linear.release_config.names import LINEAR_SPELLINGS, SPELLINGS
from kimi_linear.nn.config import BlockConfig
from kimi_linear.nn.ffn import SwiGLUConfig
from kimi_linear.nn.mixers import GQAConfig

# moonshotai/Kimi-Linear-48B-A3B-Instruct, config.json, without the hooks for its own code.
RELEASED: dict[str, Any] = {
    "architectures": ["KimiLinearForCausalLM"],
    "model_type": "kimi_linear",
    "dtype": "bfloat16",
    "vocab_size": 163840,
    "hidden_size": 2304,
    "num_hidden_layers": 27,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 72,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "rms_norm_eps": 1e-05,
    "use_cache": True,
    "bos_token_id": 163584,
    "eos_token_id": 163586,
    "pad_token_id": 163839,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "mla_use_nope": True,
    "linear_attn_config": {
        "kda_layers": [1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26],
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "num_heads": 32,
        "head_dim": 128,
        "short_conv_kernel_size": 4,
    },
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_shared_experts": 1,
    "moe_intermediate_size": 1024,
    "moe_router_activation_func": "sigmoid",
    "moe_renormalize": True,
    "routed_scaling_factor": 2.446,
    "use_grouped_topk": True,
    "num_expert_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 0,
    "model_max_length": 1048576,
}
TINY = preset("tiny")


def test_the_released_configuration_is_the_preset() -> None:
    assert from_release_config(RELEASED) == preset("48b-a3b")


def test_what_is_written_holds_every_released_key_and_the_layer_types_of_transformers() -> None:
    written = to_release_config(preset("48b-a3b"))
    assert {key: written[key] for key in RELEASED} == RELEASED
    assert [i for i, name in enumerate(written["layer_types"]) if name == "full_attention"] == [
        3,
        7,
        11,
        15,
        19,
        23,
        26,
    ]
    assert written["mlp_layer_types"] == ["dense"] + ["sparse"] * 26


@pytest.mark.parametrize("name", [size + suffix for size in SIZES for suffix in ("", "-mla")])
def test_a_configuration_survives_the_release_type_in_json(name: str) -> None:
    written = json.loads(json.dumps(to_release_config(preset(name), "float32")))
    assert written["dtype"] == "float32"
    assert from_release_config(written) == preset(name)


def test_other_options_of_the_type_survive_too() -> None:
    moe = dataclasses.replace(SIZES["tiny"].moe, activation="softmax", renormalize=False, bias_update_rate=0.5)
    dense = SwiGLUConfig(intermediate_size=24)
    kda, mla = TINY.blocks["kda"].mixer, TINY.blocks["mla"].mixer
    changed = dataclasses.replace(
        TINY,
        blocks={
            "kda_dense": BlockConfig(mixer=kda, ffn=dense),
            "mla_dense": BlockConfig(mixer=mla, ffn=dense),
            "mla": BlockConfig(mixer=mla, ffn=moe),
        },
        layers=("kda_dense", "mla_dense", "mla"),
        tie_embeddings=True,
        bos_token_id=1,
    )
    assert from_release_config(to_release_config(changed)) == changed


def without_experts() -> KimiLinearConfig:
    dense = SwiGLUConfig(intermediate_size=24)
    blocks = {f"{name}_dense": BlockConfig(mixer=TINY.blocks[name].mixer, ffn=dense) for name in ("kda", "mla")}
    return dataclasses.replace(TINY, blocks=blocks, layers=("kda_dense", "mla_dense"))


def test_a_model_without_experts_survives() -> None:
    assert from_release_config(to_release_config(without_experts())) == without_experts()


ALTERNATES = [(key, other) for key, others in SPELLINGS.items() for other in others]


@pytest.mark.parametrize(("key", "other"), ALTERNATES)
def test_every_alternate_spelling_is_read(key: str, other: str) -> None:
    given = {other if name == key else name: value for name, value in RELEASED.items()}
    assert from_release_config(given) == preset("48b-a3b")
    if key != "num_expert_group":  # any other value of it is refused
        changed = {"moe_router_activation_func": "softmax", "moe_renormalize": False}.get(key, 9)
        assert from_release_config({**given, other: changed}) != preset("48b-a3b")


@pytest.mark.parametrize(("inner", "flat"), LINEAR_SPELLINGS.items())
def test_every_flat_spelling_of_the_linear_layers_is_read(inner: str, flat: str) -> None:
    linear = RELEASED["linear_attn_config"]
    given = {
        **RELEASED,
        "linear_attn_config": {name: value for name, value in linear.items() if name != inner},
        flat: linear[inner],
    }
    assert from_release_config(given) == preset("48b-a3b")
    assert from_release_config({**given, flat: 2}) != preset("48b-a3b")


def test_unused_spellings_of_positions_and_dtype_are_accepted() -> None:
    given = {key: value for key, value in RELEASED.items() if not key.startswith("rope_") and key != "dtype"}
    given |= {"rope_parameters": {"rope_type": "yarn", "factor": 8.0}, "torch_dtype": "bfloat16"}
    assert from_release_config(given) == preset("48b-a3b")
    assert unknown_keys(given) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({other: 77}, f"{key} is .* and {other} is 77") for key, other in ALTERNATES),
        *(
            ({flat: 77}, f"linear_attn_config.{inner} is .* and {flat} is 77")
            for inner, flat in LINEAR_SPELLINGS.items()
        ),
        (
            {"layer_types": ["linear_attention"] * 4 + ["full_attention"] + ["linear_attention"] * 22},
            r"layer 4 is full_attention by linear_attn_config \(1-based\) and linear_attention by layer_types",
        ),
        ({"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 25}, "first_k_dense_replace is 1 and mlp_layer_types has 2"),
        ({"mlp_layer_types": ["sparse"] * 26 + ["dense"]}, "first_k_dense_replace is 1 and mlp_layer_types has 1"),
        ({"num_experts": None, "mlp_layer_types": ["sparse"] * 27}, "num_experts is missing"),
    ],
    ids=str,
)
def test_spellings_that_disagree_are_reported(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_release_config({**RELEASED, **change})


def test_one_list_of_layers_is_enough() -> None:
    linear = RELEASED["linear_attn_config"]
    for missing in ("kda_layers", "full_attn_layers"):
        given = {**RELEASED, "linear_attn_config": {**linear, missing: None}}
        assert from_release_config(given) == preset("48b-a3b")


def test_several_end_tokens_in_the_configuration() -> None:
    given = {**RELEASED, "eos_token_id": [163586, 163585]}
    assert from_release_config(given) == preset("48b-a3b")


def test_the_other_epsilon_of_the_latent_norm_is_written_for_us_alone() -> None:
    changed = replaced_mixer("mla", latent_norm_eps=1e-5)
    written = to_release_config(changed)
    assert (written["latent_norm_eps"], written["model_type"]) == (1e-5, "kimi_linear")
    assert from_release_config(written) == changed
    assert "latent_norm_eps" not in to_release_config(TINY)


def test_unknown_keys_are_named_and_written_ones_are_known() -> None:
    assert unknown_keys(RELEASED) == []
    assert unknown_keys(to_release_config(replaced_mixer("mla", latent_norm_eps=1e-5))) == []
    odd = {**RELEASED, "sliding_window": 4, "linear_attn_config": {**RELEASED["linear_attn_config"], "sinks": 1}}
    assert unknown_keys(odd) == ["linear_attn_config.sinks", "sliding_window"]


def test_a_configuration_saved_again_by_transformers_is_read() -> None:
    given = {
        key: value for key, value in RELEASED.items() if key not in ("linear_attn_config", "first_k_dense_replace")
    }
    written = to_release_config(preset("48b-a3b"))
    given |= {key: written[key] for key in ("layer_types", "mlp_layer_types")}
    given |= {"linear_head_dim": 128, "linear_num_heads": 32, "linear_conv_kernel_dim": 4}
    assert from_release_config(given) == preset("48b-a3b")


def test_without_linear_layers_every_layer_is_latent_attention() -> None:
    for linear in (None, {**RELEASED["linear_attn_config"], "kda_layers": [], "full_attn_layers": None}):
        config = from_release_config({**RELEASED, "linear_attn_config": linear})
        assert config == preset("48b-a3b-mla")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attn_res_block_size": 4}, r"attn_res_block_size is 4 \(.*attention over depth"),
        ({"hidden_act": "situ"}, r"hidden_act is 'situ' \(another activation"),
        ({"activation_situ_beta": 1.0}, r"activation_situ_beta is 1.0 \("),
        ({"activation_situ_linear_beta": 1.0}, r"activation_situ_linear_beta is 1.0 \("),
        ({"routed_expert_hidden_size": 512}, r"routed_expert_hidden_size is 512 \(.*narrower"),
        ({"latent_moe_use_norm": True}, r"latent_moe_use_norm is True \(.*norm"),
        ({"mla_use_output_gate": True}, r"mla_use_output_gate is True \(.*output gate on latent"),
        ({"q_lora_rank": 1536}, r"q_lora_rank is 1536 \(low-rank queries"),
        (
            {"linear_attn_config": {"gate_lower_bound": -5.0}},
            r"linear_attn_config.gate_lower_bound is -5.0 \(a bounded",
        ),
        ({"linear_attn_config": {"use_full_rank_gate": True}}, r"use_full_rank_gate is True \(one full-rank"),
        ({"moe_layer_freq": 2}, r"moe_layer_freq is 2 \("),
        ({"num_nextn_predict_layers": 1}, r"num_nextn_predict_layers is 1 \("),
        ({"mla_use_nope": False}, r"mla_use_nope is False \(rotary positions"),
        ({"attention_bias": True}, r"attention_bias is True \(biases"),
        ({"num_expert_group": 8}, r"num_expert_group is 8 \("),
        ({"num_expert_group": None, "n_group": 8}, r"num_expert_group is 8 \("),
        ({"topk_group": 4}, r"topk_group is 4 \("),
        ({"topk_method": "greedy"}, r"topk_method is 'greedy' \("),
        ({"quantization_config": {"quant_method": "fp8", "x": [1]}}, r"quantization_config is 'fp8' \(quantized"),
        ({"compression_config": {"bits": list(range(50))}}, r"compression_config is \{'bits': .*\.\.\. \(quantized"),
    ],
    ids=str,
)
def test_fields_of_other_networks_are_refused_with_a_reason(change: dict[str, Any], reason: str) -> None:
    linear = {**RELEASED["linear_attn_config"], **change.get("linear_attn_config", {})}
    with pytest.raises(ConfigError, match=f"the network another: [^;]*{reason}.*; nothing of this is supported"):
        from_release_config({**RELEASED, **change, "linear_attn_config": linear})


def test_every_field_of_kimi_k3_is_in_the_one_sentence() -> None:
    change = {"attn_res_block_size": 4, "hidden_act": "situ", "q_lora_rank": 1536, "mla_use_output_gate": True}
    linear = {**RELEASED["linear_attn_config"], "gate_lower_bound": -5.0}
    with pytest.raises(ConfigError) as caught:
        from_release_config({**RELEASED, **change, "linear_attn_config": linear})
    assert all(f"{name} is" in str(caught.value) for name in [*change, "linear_attn_config.gate_lower_bound"])
    assert str(caught.value).count(".\n") == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "deepseek_v3"}, "'deepseek_v3', expected 'kimi_linear'"),
        ({"num_hidden_layers": 28}, "name 27 layers, num_hidden_layers is 28"),
        ({"num_hidden_layers": "27"}, "num_hidden_layers is '27'"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"kv_lora_rank": None}, "'kv_lora_rank' is missing"),
        ({"linear_attn_config": {"kda_layers": [1], "full_attn_layers": [1]}}, "both 'kda' and 'mla'"),
        ({"linear_attn_config": {"kda_layers": ["1"], "full_attn_layers": [2]}}, "1-based"),
        ({"linear_attn_config": {**RELEASED["linear_attn_config"], "head_dim": None}}, "linear_attn_config.head_dim"),
        ({"linear_attn_config": {"kda_layers": [0, 1, 2], "full_attn_layers": [3]}}, "1-based"),
        ({"linear_attn_config": {"kda_layers": [1, 10**12], "full_attn_layers": [2]}}, "expected 1 to 27"),
        ({"linear_attn_config": {"kda_layers": [1, 3], "full_attn_layers": [4]}}, r"layers \[2\] are in no list"),
        ({"linear_attn_config": [1, 2]}, "expected an object"),
        ({"linear_attn_config": None, "layer_types": ["mamba"] * 27}, "layer_types holds 'mamba'"),
        ({"first_k_dense_replace": None, "mlp_layer_types": ["sparse"]}, "mlp_layer_types name 1 layers"),
    ],
)
def test_unsupported_and_incomplete_configurations_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_release_config({**RELEASED, **change})


def replaced_mixer(name: str, **fields: Any) -> KimiLinearConfig:
    block = TINY.blocks[name]
    mixer = dataclasses.replace(block.mixer, **fields)
    return dataclasses.replace(TINY, blocks={**TINY.blocks, name: dataclasses.replace(block, mixer=mixer)})


def with_biased_combine() -> KimiLinearConfig:
    moe = dataclasses.replace(SIZES["tiny"].moe, biased_combine=True)
    blocks = {
        name: dataclasses.replace(block, ffn=moe) if block.ffn.kind == "moe" else block
        for name, block in TINY.blocks.items()
    }
    return dataclasses.replace(TINY, blocks=blocks)


def both_kda(**fields: Any) -> KimiLinearConfig:
    blocks = {
        name: dataclasses.replace(b, mixer=dataclasses.replace(b.mixer, **fields)) if b.mixer.kind == "kda" else b
        for name, b in TINY.blocks.items()
    }
    return dataclasses.replace(TINY, blocks=blocks)


def dense_behind_experts() -> KimiLinearConfig:
    return dataclasses.replace(TINY, layers=("kda", "kda_dense", "mla"))


def with_window() -> KimiLinearConfig:
    block = BlockConfig(mixer=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=16), ffn=TINY.blocks["mla"].ffn)
    return dataclasses.replace(TINY, blocks={**TINY.blocks, "gqa": block}, layers=(*TINY.layers, "gqa"))


def only_kda() -> KimiLinearConfig:
    return dataclasses.replace(TINY, blocks={"kda": TINY.blocks["kda"]}, layers=("kda", "kda"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (preset("tiny-gdn"), "kind 'gdn'"),
        (with_window(), "kind 'gqa'"),
        (only_kda(), "no latent attention layer"),
        (dense_behind_experts(), "dense layer behind an expert layer"),
        (both_kda(num_v_heads=8), "value heads"),
        (both_kda(head_v_dim=8), "value dim"),
        (both_kda(gate_lower_bound=-5.0), "gate_lower_bound -5.0"),
        (both_kda(norm_eps=1e-6), "norm_eps 1e-06"),
        (replaced_mixer("kda", num_heads=2), "'kda' layers of different sizes"),
        (replaced_mixer("mla", rope_theta=1e4), "rope_theta 10000.0"),
        (replaced_mixer("mla", latent_norm_eps=1e-4), "latent_norm_eps 0.0001"),
        (with_biased_combine(), "biased_combine"),
    ],
)
def test_a_model_that_does_not_fit_the_type_is_refused(config: KimiLinearConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot hold this model: it has .*{message}"):
        to_release_config(config)
