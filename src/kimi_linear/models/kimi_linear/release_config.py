"""The released model type's configuration to and from ours. No torch.

Written is a superset that Moonshot's own code, transformers, vLLM, SGLang, llama.cpp and mlx-lm each find their keys
in: the released keys with their 1-based layer lists, and transformers' 0-based `layer_types` and `mlp_layer_types`.
The type holds Kimi Delta Attention (equal heads and dims, softplus gate) and latent attention without positions, with
dense layers first and experts after them.

Read are the released keys and the spellings in circulation. Kimi-K3's text tower carries the same model type and
other mathematics: its fields are refused by name, never ignored.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from kimi_linear.base.errors import ConfigError
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.nn.component import ComponentConfig
from kimi_linear.nn.config import BlockConfig
from kimi_linear.nn.ffn import MoEConfig, SwiGLUConfig
from kimi_linear.nn.mixers import KDAConfig, MixerConfig, MLAConfig
from kimi_linear.nn.mixers.mla.config import LATENT_NORM_EPS
from kimi_linear.nn.placement import from_lists

C = TypeVar("C", bound=ComponentConfig)

_LAYER_NAMES = {"kda": "linear_attention", "mla": "full_attention"}
_FFN_NAMES = {"swiglu": "dense", "moe": "sparse"}

# Released key -> other spellings, in order.
_SPELLINGS = {
    "model_max_length": ("max_position_embeddings",),
    "num_experts": ("num_local_experts", "n_routed_experts"),
    "num_experts_per_token": ("num_experts_per_tok", "top_k_experts"),
    "num_shared_experts": ("n_shared_experts",),
    "moe_renormalize": ("norm_topk_prob",),
    "num_expert_group": ("n_group",),
    "moe_router_activation_func": ("scoring_func",),
}
_LINEAR_SPELLINGS = {
    "head_dim": "linear_head_dim",
    "num_heads": "linear_num_heads",
    "short_conv_kernel_size": "linear_conv_kernel_dim",
}


def to_release_config(config: KimiLinearConfig, dtype: str = "bfloat16") -> dict[str, Any]:
    """Return the release type's configuration of a model that fits it, ready for config.json.

    Raises:
        ConfigError: The model does not fit; names the first thing that does not.
    """
    parts = _parts(config)
    mla, dense = parts.mla, parts.dense
    types = [_LAYER_NAMES[block.mixer.kind] for block in config.layer_blocks]
    written = {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": "kimi_linear",
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": mla.num_heads,
        "num_key_value_heads": mla.num_heads,
        "head_dim": config.hidden_size // mla.num_heads,
        "hidden_act": "silu",
        "initializer_range": config.initializer_range,
        "intermediate_size": config.hidden_size * 4 if dense is None else dense.intermediate_size,
        "rms_norm_eps": config.norm_eps,
        "use_cache": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "q_lora_rank": None,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_nope_head_dim": mla.qk_nope_head_dim,
        "qk_rope_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "mla_use_nope": True,
        "first_k_dense_replace": parts.first_dense,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
        "model_max_length": config.max_length,
        "layer_types": types,
        "mlp_layer_types": [_FFN_NAMES[block.ffn.kind] for block in config.layer_blocks],
    }
    return {**written, **_write_linear(parts.kda, types), **_write_experts(parts.moe)}


def _write_linear(kda: KDAConfig | None, types: list[str]) -> dict[str, Any]:
    if kda is None:
        return {"linear_attn_config": None}
    numbered = list(enumerate(types, start=1))
    return {
        "linear_attn_config": {
            "kda_layers": [number for number, name in numbered if name == "linear_attention"],
            "full_attn_layers": [number for number, name in numbered if name == "full_attention"],
            "num_heads": kda.num_heads,
            "head_dim": kda.head_dim,
            "short_conv_kernel_size": kda.conv_size,
        }
    }


def _write_experts(moe: MoEConfig | None) -> dict[str, Any]:
    if moe is None:
        return {"num_experts": None}
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_token": moe.top_k,
        "num_shared_experts": moe.num_shared_experts,
        "moe_intermediate_size": moe.intermediate_size,
        "moe_router_activation_func": moe.activation,
        "moe_renormalize": moe.renormalize,
        "routed_scaling_factor": moe.scaling,
        "use_grouped_topk": True,
        "num_expert_group": 1,
        "topk_group": 1,
    }


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The one geometry of each kind of part that the released type has room for."""

    kda: KDAConfig | None
    mla: MLAConfig
    dense: SwiGLUConfig | None
    moe: MoEConfig | None
    # Leading dense layers in front of expert layers.
    first_dense: int


def _parts(config: KimiLinearConfig) -> _Parts:
    """Return the parts of a model that fits the released type, or raise ConfigError for the first that does not."""
    if config.residual != "standard":
        raise _misfit(f"residual {config.residual!r}", "the standard one")
    mixers, ffns = [b.mixer for b in config.layer_blocks], [b.ffn for b in config.layer_blocks]
    _check_kinds(mixers, ("kda", "mla"))
    _check_kinds(ffns, ("swiglu", "moe"))
    kda, mla = _only(KDAConfig, mixers), _only(MLAConfig, mixers)
    dense, moe = _only(SwiGLUConfig, ffns), _only(MoEConfig, ffns)
    if mla is None:
        raise _misfit("no latent attention layer", "at least one")
    _check_mla(mla)
    if kda is not None:
        _check_kda(kda, config.norm_eps)
    is_dense = [ffn.kind == "swiglu" for ffn in ffns]
    first_dense = 0 if moe is None else is_dense.index(False)
    if moe is not None and any(is_dense[first_dense:]):
        raise _misfit("a dense layer behind an expert layer", "dense layers first")
    return _Parts(kda, mla, dense, moe, first_dense)


def _check_kinds(parts: Sequence[ComponentConfig], allowed: tuple[str, ...]) -> None:
    for part in parts:
        if part.kind not in allowed:
            raise _misfit(f"a layer of kind {part.kind!r}", f"kinds {', '.join(allowed)}")


def _only(cls: type[C], parts: Sequence[ComponentConfig]) -> C | None:
    """Return the one configuration of that class among the parts, None if there is none."""
    found = [part for part in parts if isinstance(part, cls)]
    if any(part != found[0] for part in found):
        raise _misfit(f"{found[0].kind!r} layers of different sizes", "one size a kind")
    return found[0] if found else None


def _check_mla(mla: MLAConfig) -> None:
    if mla.rope_theta is not None or mla.latent_norm_eps != LATENT_NORM_EPS:
        raise _misfit(
            f"latent attention with rope_theta {mla.rope_theta} and latent_norm_eps {mla.latent_norm_eps}",
            f"None and {LATENT_NORM_EPS}",
        )


def _check_kda(kda: KDAConfig, norm_eps: float) -> None:
    if (kda.value_dim, kda.value_heads) != (kda.head_dim, kda.num_heads):
        raise _misfit("Kimi Delta Attention with value heads or a value dim of their own", "those of the keys")
    if kda.gate_lower_bound is not None:
        raise _misfit(f"Kimi Delta Attention with gate_lower_bound {kda.gate_lower_bound}", "the softplus gate")
    if kda.norm_eps != norm_eps:
        raise _misfit(f"Kimi Delta Attention with norm_eps {kda.norm_eps}", f"the model's {norm_eps}")


def _misfit(given: str, expected: str) -> ConfigError:
    return ConfigError(
        f"the released model type cannot hold this model: it has {given}, the type has {expected}; save it in the "
        "package's own format."
    )


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
    linear = given.get("linear_attn_config") or {}
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


def _find(given: dict[str, Any], name: str, default: Any = None) -> Any:
    for spelling in (name, *_SPELLINGS.get(name, ())):
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
    linear = given.get("linear_attn_config") or {}
    if linear.get("kda_layers") is not None or linear.get("full_attn_layers") is not None:
        kda = linear.get("kda_layers") or []
        full = linear.get("full_attn_layers")
        if full is None:
            full = [number for number in range(1, count + 1) if number not in kda]
        types = from_lists({"kda": kda, "mla": full})
    elif given.get("layer_types") is not None:
        names = {name: kind for kind, name in _LAYER_NAMES.items()}
        unknown = sorted(set(given["layer_types"]) - set(names))
        if unknown:
            raise ConfigError(f"layer_types holds {unknown}, expected only {sorted(names)}.")
        types = tuple(names[name] for name in given["layer_types"])
    else:
        types = ("mla",) * count
    if len(types) != count:
        raise ConfigError(f"the layer lists name {len(types)} layers, num_hidden_layers is {count}; they must agree.")
    return types


def _sparse_layers(given: dict[str, Any], count: int) -> list[bool]:
    if _find(given, "num_experts") is None:
        return [False] * count
    if given.get("first_k_dense_replace") is None and given.get("mlp_layer_types") is not None:
        return [name == "sparse" for name in given["mlp_layer_types"]]
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
    linear = given.get("linear_attn_config") or {}
    sizes = {}
    for name, flat in _LINEAR_SPELLINGS.items():
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
    )
