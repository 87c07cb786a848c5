"""A released configuration in our terms; fields of other models are refused by name. No torch."""

from typing import Any

from kimi_linear.base.config import check_type
from kimi_linear.base.errors import ConfigError, shown
from kimi_linear.models.kimi_linear.config import MAX_LAYERS, KimiLinearConfig
from kimi_linear.models.kimi_linear.release_config.names import FFN_NAMES, LAYER_NAMES, LINEAR_SPELLINGS
from kimi_linear.models.kimi_linear.release_config.refuse import (
    find,
    linear_part,
    refuse_contradictions,
    refuse_other_models,
)
from kimi_linear.nn.component import check_whole
from kimi_linear.nn.config import BlockConfig
from kimi_linear.nn.ffn import MoEConfig, SwiGLUConfig
from kimi_linear.nn.mixers import KDAConfig, MixerConfig, MLAConfig
from kimi_linear.nn.placement import from_lists

# Of the values that are used before a part of ours checks them, or whose key ours does not show.
_TYPES: dict[str, Any] = {
    "linear_attn_config.kda_layers": list,
    "linear_attn_config.full_attn_layers": list,
    "layer_types": list,
    "mlp_layer_types": list,
    "first_k_dense_replace": int,
    "rms_norm_eps": float,
    "latent_norm_eps": float,
    "routed_scaling_factor": float,
    "tie_word_embeddings": bool,
    "moe_renormalize": bool,
    "norm_topk_prob": bool,
}


def from_release_config(given: dict[str, Any]) -> KimiLinearConfig:
    """Return our configuration of a released (or re-saved) one.

    Raises:
        ConfigError: Fields of Kimi-K3 or of other unsupported mathematics, by name; a size is missing; the layer
            lists do not cover every layer once.
    """
    refuse_other_models(given)
    refuse_contradictions(given)
    _check_types(given)
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
        max_length=find(given, "model_max_length", 4096),
        bos_token_id=given.get("bos_token_id"),
        eos_token_id=_first(given.get("eos_token_id")),
        pad_token_id=given.get("pad_token_id"),
    )


def _first(tokens: Any) -> Any:
    """Return the first of several end tokens; the others are among those that end a text all the same."""
    return tokens[0] if isinstance(tokens, list) and tokens else tokens


def _check_types(given: dict[str, Any]) -> None:
    """Raise ConfigError for a value of another type than its key's, by the key; what goes into a part, it checks."""
    linear = {f"linear_attn_config.{name}": value for name, value in linear_part(given).items()}
    for name, hint in _TYPES.items():
        value = linear.get(name, given.get(name))
        if value is not None:
            check_type(value, hint, name)


def _need(given: dict[str, Any], name: str) -> Any:
    value = find(given, name)
    if value is None:
        raise ConfigError(f"config.json: key {name!r} is missing and has no safe default; add it.")
    return value


def _layer_types(given: dict[str, Any]) -> tuple[str, ...]:
    """Return "kda" or "mla" for each layer, from the 1-based lists or the 0-based layer_types, which must agree."""
    count = _need(given, "num_hidden_layers")
    check_whole("num_hidden_layers", count, least=1, most=MAX_LAYERS)
    linear = linear_part(given)
    listed, named = None, None
    if linear.get("kda_layers") is not None or linear.get("full_attn_layers") is not None:
        kda, full = linear.get("kda_layers"), linear.get("full_attn_layers")
        outside = [n for n in (*(kda or ()), *(full or ())) if isinstance(n, int) and n > count]
        if outside:
            raise ConfigError(f"linear_attn_config lists layer {outside[0]}, expected 1 to {count} (1-based).")
        listed = from_lists({"kda": _others(full, count) if kda is None else kda, "mla": _others(kda, count, full)})
        _check_count(listed, count, "linear_attn_config's lists")
    if given.get("layer_types") is not None:
        named = _translated(given, "layer_types", LAYER_NAMES)
        _check_count(named, count, "layer_types")
    if listed and named and listed != named:
        index = next(i for i, pair in enumerate(zip(listed, named, strict=True)) if pair[0] != pair[1])
        raise ConfigError(
            f"layer {index + 1} is {LAYER_NAMES[listed[index]]} by linear_attn_config (1-based) and "
            f"{LAYER_NAMES[named[index]]} by layer_types (0-based); remove the wrong one."
        )
    return listed or named or ("mla",) * count


def _others(numbers: Any, count: int, given: Any = None) -> Any:
    """Return the list that was given, else the layers that are not in the other one."""
    return given if given is not None else [number for number in range(1, count + 1) if number not in numbers]


def _check_count(types: tuple[str, ...], count: int, what: str) -> None:
    if len(types) != count:
        raise ConfigError(f"{what} name {len(types)} layers, num_hidden_layers is {count}; they must agree.")


def _translated(given: dict[str, Any], key: str, names: dict[str, str]) -> tuple[str, ...]:
    """Return our kinds for a list of the released type's names."""
    kinds = {name: kind for kind, name in names.items()}
    # A list, as what is looked for may be anything.
    unknown = [name for name in given[key] if name not in list(kinds)]
    if unknown:
        raise ConfigError(f"{key} holds {shown(unknown[0])}, expected only {', '.join(kinds)}.")
    return tuple(kinds[name] for name in given[key])


def _sparse_layers(given: dict[str, Any], count: int) -> list[bool]:
    """Return whether each layer has experts, from first_k_dense_replace or mlp_layer_types, which must agree."""
    first = given.get("first_k_dense_replace")
    counted = None if first is None else [index >= first for index in range(count)]
    named = None
    if given.get("mlp_layer_types") is not None:
        kinds = _translated(given, "mlp_layer_types", FFN_NAMES)
        _check_count(kinds, count, "mlp_layer_types")
        named = [kind == "moe" for kind in kinds]
    if not find(given, "num_experts"):
        if named and any(named):
            raise ConfigError("mlp_layer_types has sparse layers and num_experts is missing; add it.")
        return [False] * count
    if counted and named and counted != named:
        raise ConfigError(
            f"first_k_dense_replace is {first} and mlp_layer_types has {named.count(False)} dense layers or dense "
            "layers elsewhere; remove the wrong one."
        )
    return counted or named or [True] * count


def _read_mla(given: dict[str, Any]) -> MLAConfig:
    return MLAConfig(
        num_heads=_need(given, "num_attention_heads"),
        kv_lora_rank=_need(given, "kv_lora_rank"),
        qk_nope_head_dim=_need(given, "qk_nope_head_dim"),
        qk_rope_head_dim=_need(given, "qk_rope_head_dim"),
        v_head_dim=_need(given, "v_head_dim"),
        # Ours alone: engines differ here, and none of them writes what it took.
        latent_norm_eps=given.get("latent_norm_eps", MLAConfig.latent_norm_eps),
    )


def _read_kda(given: dict[str, Any], norm_eps: float) -> KDAConfig:
    linear = linear_part(given)
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
        num_shared_experts=find(given, "num_shared_experts", 0),
        scaling=given.get("routed_scaling_factor", 1.0),
        renormalize=find(given, "moe_renormalize", True),
        activation=find(given, "moe_router_activation_func", "sigmoid"),
        bias_update_rate=given.get("router_bias_update_rate", MoEConfig.bias_update_rate),
    )
