"""GGUF's metadata and the released configuration: one table for both directions, and what llama.cpp cannot run."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from kimi_linear.base.errors import CheckpointError, ConfigError
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.models.kimi_linear.release_config import from_release_config, to_release_config

ARCHITECTURE = "kimi-linear"

# Under "kimi-linear.", and in the released configuration.
_WHOLE = {
    "vocab_size": "vocab_size",
    "context_length": "model_max_length",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "leading_dense_block_count": "first_k_dense_replace",
    "attention.head_count": "num_attention_heads",
    "attention.kv_lora_rank": "kv_lora_rank",
    "attention.value_length_mla": "v_head_dim",
    "rope.dimension_count": "qk_rope_head_dim",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_token",
    "expert_shared_count": "num_shared_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_REAL = {"attention.layer_norm_rms_epsilon": "rms_norm_eps", "expert_weights_scale": "routed_scaling_factor"}
# The same, inside linear_attn_config.
_LINEAR = {"kda.head_dim": "head_dim", "ssm.conv_kernel": "short_conv_kernel_size"}
_GATES = {"softmax": 1, "sigmoid": 2}
# Special tokens: in the configuration, and in "tokenizer.ggml.".
_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}
# For a model whose layers are all dense.
_NO_EXPERTS = {
    **dict.fromkeys(("num_experts", "num_experts_per_token", "num_shared_experts", "moe_intermediate_size"), 0),
    "routed_scaling_factor": 1.0,
    "moe_router_activation_func": "sigmoid",
}
# No key of llama.cpp's, which wants the output head as a tensor of its own.
_TIED = "tie_word_embeddings"


def to_metadata(config: KimiLinearConfig) -> dict[str, Any]:
    """Return the metadata of a model: whole numbers, floats, booleans and one list of whole numbers.

    Raises:
        ConfigError: The released type cannot hold the model, or llama.cpp would compute something else; says why.

    Example:
        >>> from kimi_linear.models.kimi_linear.presets import preset
        >>> to_metadata(preset("tiny"))["kimi-linear.attention.head_count_kv"]
        [0, 0, 0, 1]
    """
    release = to_release_config(config)
    if not release["num_experts"]:
        release |= _NO_EXPERTS
    else:
        _check_experts(release)
    _check_attention(release)
    rank, rope = release["kv_lora_rank"], release["qk_rope_head_dim"]
    written = {
        **{key: release[name] for key, name in _WHOLE.items()},
        **{key: float(release[name]) for key, name in _REAL.items()},
        **{key: release["linear_attn_config"][name] for key, name in _LINEAR.items()},
        # Latents are cached as one key/value head for all queries; 0 marks Kimi Delta Attention.
        "attention.head_count_kv": [0 if kind == "linear_attention" else 1 for kind in release["layer_types"]],
        "attention.key_length": rank + rope,
        "attention.value_length": rank,
        "attention.key_length_mla": release["qk_nope_head_dim"] + rope,
        "expert_gating_func": _GATES[release["moe_router_activation_func"]],
        "expert_weights_norm": True,
        _TIED: config.tie_embeddings,
    }
    return {f"{ARCHITECTURE}.{key}": value for key, value in written.items()}


def _check_attention(release: Mapping[str, Any]) -> None:
    """Refuse what llama.cpp's kimi-linear would not load."""
    linear = release["linear_attn_config"]
    if not linear["kda_layers"]:
        raise _unsupported("no layer with Kimi Delta Attention", "some")
    if linear["num_heads"] != release["num_attention_heads"]:
        given = f"{linear['num_heads']} heads of Kimi Delta Attention and {release['num_attention_heads']} of latent"
        raise _unsupported(f"{given} attention", "one number of heads")


def _check_experts(release: Mapping[str, Any]) -> None:
    """Refuse what llama.cpp's kimi-linear would load and compute differently."""
    if not release["moe_renormalize"]:
        raise _unsupported("expert weights that are not renormalised", "renormalised ones")
    if release["num_shared_experts"] == 0:
        raise _unsupported("no shared expert", "at least one")


def _unsupported(given: str, expected: str) -> ConfigError:
    return ConfigError(
        f"llama.cpp cannot run this model: it has {given}, and its kimi-linear expects {expected}; "
        "export another format."
    )


def from_metadata(metadata: Mapping[str, Any], has_output: bool) -> KimiLinearConfig:
    """Return the configuration that a file's metadata describes.

    Args:
        metadata: Every key of the file.
        has_output: Whether there is an output head; without one the embeddings are tied.

    Raises:
        CheckpointError: Another architecture, or a key is missing or makes no sense; says which.
    """
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise CheckpointError(f"it holds a model of architecture {architecture!r}, expected {ARCHITECTURE!r}.")
    given = {key.removeprefix(f"{ARCHITECTURE}."): value for key, value in metadata.items()}
    if type(given.get("attention.head_count")) is list:
        # Some writers repeat the number for every layer.
        given["attention.head_count"] = max(given["attention.head_count"], default=None)
    for key in (*_WHOLE, *_LINEAR, "attention.key_length_mla", "expert_gating_func"):
        if type(given.get(key)) is not int:
            raise CheckpointError(f"its metadata has {key} = {given.get(key)!r}, expected a whole number.")
    release = {name: given[key] for key, name in _WHOLE.items()}
    given.setdefault("expert_weights_scale", 1.0)
    release |= {name: _shortest(given.get(key), key) for key, name in _REAL.items()}
    release["num_experts"] = release["num_experts"] or None
    release["qk_nope_head_dim"] = given["attention.key_length_mla"] - given["rope.dimension_count"]
    release["linear_attn_config"] = _linear(given)
    release["moe_router_activation_func"] = next(
        (name for name, number in _GATES.items() if number == given["expert_gating_func"]), "unknown"
    )
    tokens = {f"{name}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _TOKENS.items()}
    release |= {"model_type": "kimi_linear", **tokens}
    release["tie_word_embeddings"] = not has_output or given.get(_TIED) is True
    return _checked(release)


def _linear(given: Mapping[str, Any]) -> dict[str, Any]:
    heads = given.get("attention.head_count_kv")
    if type(heads) is not list or len(heads) != given["block_count"]:
        raise CheckpointError(
            f"its metadata has attention.head_count_kv = {str(heads)[:60]}, expected {given['block_count']} numbers."
        )
    numbered = list(enumerate(heads, start=1))
    return {
        "kda_layers": [number for number, count in numbered if count == 0],
        "full_attn_layers": [number for number, count in numbered if count != 0],
        "num_heads": given["attention.head_count"],
        **{name: given[key] for key, name in _LINEAR.items()},
    }


def _shortest(value: Any, key: str) -> float:
    """Return the shortest decimal that is this float32: files hold 1e-05 as 9.99999974e-06."""
    if type(value) is not float or not np.isfinite(value):
        raise CheckpointError(f"its metadata has {key} = {value!r}, expected a number.")
    return float(str(np.float32(value)))


def _checked(release: dict[str, Any]) -> KimiLinearConfig:
    try:
        config = from_release_config(release)
        # The shapes meet every size, so one that makes no sense shows here.
        config.shapes()
        return config
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"its metadata makes no model: {error}") from error
