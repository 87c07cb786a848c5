"""Our configuration in the released type's terms, or why it has none. No torch."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from kimi_linear.base.errors import ConfigError
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.models.kimi_linear.release_config.names import FFN_NAMES, LAYER_NAMES
from kimi_linear.nn.component import ComponentConfig
from kimi_linear.nn.ffn import MoEConfig, SwiGLUConfig
from kimi_linear.nn.mixers import KDAConfig, MLAConfig
from kimi_linear.nn.mixers.mla.config import LATENT_NORM_EPS

C = TypeVar("C", bound=ComponentConfig)


def to_release_config(config: KimiLinearConfig, dtype: str = "bfloat16") -> dict[str, Any]:
    """Return the release type's configuration of a model that fits it, ready for config.json.

    Raises:
        ConfigError: The model does not fit; names the first thing that does not.
    """
    parts = _parts(config)
    mla, dense = parts.mla, parts.dense
    types = [LAYER_NAMES[block.mixer.kind] for block in config.layer_blocks]
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
        "intermediate_size": 4 * config.hidden_size if dense is None else dense.intermediate_size,
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
        "mlp_layer_types": [FFN_NAMES[block.ffn.kind] for block in config.layer_blocks],
    }
    written |= {"linear_attn_config": _write_linear(parts.kda, types), **_write_experts(parts.moe, written)}
    if mla.latent_norm_eps != LATENT_NORM_EPS:
        # Ours alone: the other engines take the one or the other whatever is written.
        written["latent_norm_eps"] = mla.latent_norm_eps
    return written


def _write_linear(kda: KDAConfig | None, types: list[str]) -> dict[str, Any]:
    numbered = list(enumerate(types, start=1))
    # Without linear layers too: transformers cannot read a null here.
    lists = {
        "kda_layers": [number for number, name in numbered if name == "linear_attention"],
        "full_attn_layers": [number for number, name in numbered if name == "full_attention"],
    }
    if kda is None:
        return lists
    return {
        **lists,
        "num_heads": kda.num_heads,
        "head_dim": kda.head_dim,
        "short_conv_kernel_size": kda.conv_size,
    }


def _write_experts(moe: MoEConfig | None, written: dict[str, Any]) -> dict[str, Any]:
    if moe is None:
        # Readers that know no default find their keys, and no layer has experts.
        return {"num_experts": 0, "num_shared_experts": 0, "moe_intermediate_size": written["intermediate_size"]}
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_token": moe.top_k,
        "num_shared_experts": moe.num_shared_experts,
        "moe_intermediate_size": moe.intermediate_size,
        "moe_router_activation_func": moe.activation,
        "moe_renormalize": moe.renormalize,
        "routed_scaling_factor": moe.scaling,
        # Ours alone: it steers training and changes no result.
        "router_bias_update_rate": moe.bias_update_rate,
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
    # Leading dense layers: all of them, without experts.
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
    _check_mla(mla, config.norm_eps)
    if kda is not None:
        _check_kda(kda, config.norm_eps)
    if moe is not None and moe.biased_combine:
        raise _misfit("biased_combine", "weights without the selection bias")
    is_dense = [ffn.kind == "swiglu" for ffn in ffns]
    first_dense = len(ffns) if moe is None else is_dense.index(False)
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


def _check_mla(mla: MLAConfig, norm_eps: float) -> None:
    if mla.rope_theta is not None:
        raise _misfit(f"latent attention with rope_theta {mla.rope_theta}", "no positions")
    # Some engines read a checkpoint of the released type with the one, some with the other.
    if mla.latent_norm_eps not in (LATENT_NORM_EPS, norm_eps):
        raise _misfit(f"latent_norm_eps {mla.latent_norm_eps}", f"{LATENT_NORM_EPS} or the model's {norm_eps}")


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
