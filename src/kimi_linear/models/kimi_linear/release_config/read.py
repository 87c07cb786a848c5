"""A released configuration in our terms; fields of other models are refused by name. No torch."""

from typing import Any

from kimi_linear.base.errors import ConfigError
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.models.kimi_linear.release_config.names import FFN_NAMES, LAYER_NAMES, LINEAR_SPELLINGS, SPELLINGS
from kimi_linear.nn.component import check_whole
from kimi_linear.nn.config import BlockConfig
from kimi_linear.nn.ffn import MoEConfig, SwiGLUConfig
from kimi_linear.nn.mixers import KDAConfig, MixerConfig, MLAConfig
from kimi_linear.nn.placement import from_lists


def from_release_config(given: dict[str, Any]) -> KimiLinearConfig:
    """Return our configuration of a released (or re-saved) one.

    Raises:
        ConfigError: Fields of Kimi-K3 or of other unsupported mathematics, by name; a size is missing; the layer
            lists do not cover every layer once.
    """
    _refuse_other_models(given)
    types = _layer_types(given)
    norm_eps = given.get("rms_norm_eps", 1e-6)
    mixers: dict[str, MixerConfig] = {}
    if "mla" in types:
        mixers["mla"] = _read_mla(given)
    if "kda" in types:
        mixers["kda"] = _read_kda(given, norm_eps)
    sparse = _sparse_layers(given, len(types))
    layers = tuple(name if is_sparse else f"{name}_dense" for name, is_sparse in zip(types, sparse, strict=True))
    dense = SwiGLUConfig(intermediate_size=_need(given, "intermediate_size")) if not all(sparse) else None
    moe = _read_moe(given) if any(sparse) else None
    blocks = {}
    for name in dict.fromkeys(layers):
        ffn = dense if name.endswith("_dense") else moe
        assert ffn is not None
        blocks[name] = BlockConfig(mixer=mixers[name.removesuffix("_dense")], ffn=ffn)
    vocab_size = _need(given, "vocab_size")
    return KimiLinearConfig(
        vocab_size=vocab_size,
        hidden_size=_need(given, "hidden_size"),
        blocks=blocks,
        layers=layers,
        norm_eps=norm_eps,
        tie_embeddings=given.get("tie_word_embeddings", False),
        initializer_range=given.get("initializer_range", 0.02),
        max_length=_find(given, "model_max_length", 4096),
        bos_token_id=given.get("bos_token_id"),
        eos_token_id=given.get("eos_token_id"),
        pad_token_id=given.get("pad_token_id"),
    )


def _refuse_other_models(given: dict[str, Any]) -> None:
    if given.get("model_type") != "kimi_linear":
        raise ConfigError(f"model_type is {given.get('model_type')!r}, expected 'kimi_linear'; this is another model.")
    linear = _linear(given)
    present = {
        "attn_res_block_size": given.get("attn_res_block_size") is not None,
        "hidden_act": given.get("hidden_act", "silu") != "silu",
        "activation_situ_beta": given.get("activation_situ_beta") is not None,
        "activation_situ_linear_beta": given.get("activation_situ_linear_beta") is not None,
        "routed_expert_hidden_size": given.get("routed_expert_hidden_size") is not None,
        "latent_moe_use_norm": bool(given.get("latent_moe_use_norm")),
        "mla_use_output_gate": bool(given.get("mla_use_output_gate")),
        "q_lora_rank": given.get("q_lora_rank") is not None,
        "linear_attn_config.gate_lower_bound": linear.get("gate_lower_bound") is not None,
        "linear_attn_config.use_full_rank_gate": bool(linear.get("use_full_rank_gate")),
    }
    found = [name for name, here in present.items() if here]
    if found:
        raise ConfigError(
            f"config has {', '.join(found)}: fields of Kimi-K3's text model, which shares the model type 'kimi_linear' "
            "and computes something else; load a Kimi Linear checkpoint."
        )
    expected = {"moe_layer_freq": 1, "num_nextn_predict_layers": 0, "mla_use_nope": True, "topk_group": 1}
    for name, value in expected.items():
        if given.get(name, value) not in (value, None):
            raise ConfigError(f"{name} is {given[name]}, expected {value}: nothing else is supported.")
    if _find(given, "num_expert_group", 1) not in (1, None):
        raise ConfigError(
            f"num_expert_group is {_find(given, 'num_expert_group', 1)}, expected 1: no groups are supported."
        )


def _linear(given: dict[str, Any]) -> dict[str, Any]:
    linear = given.get("linear_attn_config") or {}
    if not isinstance(linear, dict):
        raise ConfigError(f"linear_attn_config is {linear!r}, expected an object with the layer lists and sizes.")
    return linear


def _find(given: dict[str, Any], name: str, default: Any = None) -> Any:
    for spelling in (name, *SPELLINGS.get(name, ())):
        if given.get(spelling) is not None:
            return given[spelling]
    return default


def _need(given: dict[str, Any], name: str) -> Any:
    value = _find(given, name)
    if value is None:
        raise ConfigError(f"config.json: key {name!r} is missing and has no safe default; add it.")
    return value


def _layer_types(given: dict[str, Any]) -> tuple[str, ...]:
    """Return "kda" or "mla" for each layer, from the 1-based lists or the 0-based layer_types."""
    count = _need(given, "num_hidden_layers")
    check_whole("num_hidden_layers", count, least=1)
    linear = _linear(given)
    if linear.get("kda_layers") is not None or linear.get("full_attn_layers") is not None:
        kda = linear.get("kda_layers") or []
        full = linear.get("full_attn_layers")
        if full is None:
            full = [number for number in range(1, count + 1) if number not in kda]
        types = from_lists({"kda": kda, "mla": full})
    elif given.get("layer_types") is not None:
        types = _translated(given, "layer_types", LAYER_NAMES)
    else:
        types = ("mla",) * count
    if len(types) != count:
        raise ConfigError(f"the layer lists name {len(types)} layers, num_hidden_layers is {count}; they must agree.")
    return types


def _translated(given: dict[str, Any], key: str, names: dict[str, str]) -> tuple[str, ...]:
    """Return our kinds for a list of the released type's names."""
    kinds = {name: kind for kind, name in names.items()}
    unknown = [name for name in given[key] if name not in kinds]
    if unknown:
        raise ConfigError(f"{key} holds {unknown[0]!r}, expected only {', '.join(kinds)}.")
    return tuple(kinds[name] for name in given[key])


def _sparse_layers(given: dict[str, Any], count: int) -> list[bool]:
    if _find(given, "num_experts") is None:
        return [False] * count
    if given.get("first_k_dense_replace") is None and given.get("mlp_layer_types") is not None:
        kinds = _translated(given, "mlp_layer_types", FFN_NAMES)
        if len(kinds) != count:
            raise ConfigError(
                f"mlp_layer_types names {len(kinds)} layers, num_hidden_layers is {count}; they must agree."
            )
        return [kind == "moe" for kind in kinds]
    return [index >= (given.get("first_k_dense_replace") or 0) for index in range(count)]


def _read_mla(given: dict[str, Any]) -> MLAConfig:
    return MLAConfig(
        num_heads=_need(given, "num_attention_heads"),
        kv_lora_rank=_need(given, "kv_lora_rank"),
        qk_nope_head_dim=_need(given, "qk_nope_head_dim"),
        qk_rope_head_dim=_need(given, "qk_rope_head_dim"),
        v_head_dim=_need(given, "v_head_dim"),
    )


def _read_kda(given: dict[str, Any], norm_eps: float) -> KDAConfig:
    linear = _linear(given)
    sizes = {}
    for name, flat in LINEAR_SPELLINGS.items():
        value = linear.get(name, given.get(flat))
        if value is None:
            raise ConfigError(f"config.json: key linear_attn_config.{name} is missing and has no safe default; add it.")
        sizes[name] = value
    return KDAConfig(
        num_heads=sizes["num_heads"],
        head_dim=sizes["head_dim"],
        conv_size=sizes["short_conv_kernel_size"],
        norm_eps=norm_eps,
    )


def _read_moe(given: dict[str, Any]) -> MoEConfig:
    return MoEConfig(
        num_experts=_need(given, "num_experts"),
        top_k=_need(given, "num_experts_per_token"),
        intermediate_size=_need(given, "moe_intermediate_size"),
        num_shared_experts=_find(given, "num_shared_experts", 0),
        scaling=given.get("routed_scaling_factor", 1.0),
        renormalize=_find(given, "moe_renormalize", True),
        activation=_find(given, "moe_router_activation_func", "sigmoid"),
        bias_update_rate=given.get("router_bias_update_rate", MoEConfig.bias_update_rate),
    )
