"""Checks of config.json: what other engines read in it."""

from collections.abc import Iterator
from typing import Any

from kimi_linear.base.errors import ConfigError
from kimi_linear.checkpoint.configs import OWN_TYPE
from kimi_linear.checkpoint.layout import HEAD
from kimi_linear.models.kimi_linear.release_config import to_release_config, unknown_keys
from kimi_linear.nn.ffn import MoEConfig
from kimi_linear.nn.mixers import KDAConfig, MLAConfig
from kimi_linear.recipes.checkup.evidence import Evidence
from kimi_linear.recipes.checkup.finding import ALL, LLAMA, MLX, OTHERS, SGLANG, TRANSFORMERS, VLLM, Finding

# Released keys, and who has no safe default for each: a default of its own that differs, or none at all.
_NEEDED: dict[str, tuple[str, ...]] = {
    "linear_attn_config": (VLLM, SGLANG, LLAMA, MLX),
    "first_k_dense_replace": (VLLM, SGLANG, LLAMA, MLX),
    "mla_use_nope": (VLLM, SGLANG),
    "num_experts": (VLLM, SGLANG, MLX),
    "num_experts_per_token": (VLLM, SGLANG, MLX),
    "num_shared_experts": (VLLM, SGLANG, LLAMA, MLX),
    "moe_intermediate_size": (TRANSFORMERS, VLLM, SGLANG, LLAMA, MLX),
    "moe_router_activation_func": (VLLM, SGLANG, MLX),
    "moe_renormalize": (VLLM, SGLANG, MLX),
    "routed_scaling_factor": (TRANSFORMERS, VLLM, SGLANG, LLAMA, MLX),
    "rms_norm_eps": (TRANSFORMERS, VLLM, SGLANG, LLAMA, MLX),
    "model_max_length": (MLX,),
    "num_key_value_heads": (MLX,),
    "head_dim": (MLX,),
    "rope_theta": (MLX,),
}


def network(evidence: Evidence) -> Iterator[Finding]:
    """See whether it can be read, has keys that nobody knows, or points to code."""
    if evidence.config is None:
        fix = "correct config.json by hand; nothing else can be repaired before"
        yield Finding("config", "error", evidence.problem, ALL, fix)
        return
    if not evidence.is_released_type:
        text = f"the model type is {OWN_TYPE}: the released type cannot hold this network."
        yield Finding("config", "warning", text, OTHERS, "load it with this package")
        return
    unknown = unknown_keys(dict(evidence.given))
    if unknown:
        text = f"config.json has keys that nobody here knows and that are not read: {', '.join(unknown)}."
        yield Finding("config", "warning", text, ALL, "find out what they mean; remove them if they mean nothing")
    if evidence.given.get("auto_map"):
        text = "config.json points to Python files beside it (auto_map); no engine needs them any more."
        fix = "remove auto_map and the files"
        yield Finding("config", "warning", text, (TRANSFORMERS, VLLM, SGLANG), fix, fixable=True)


def _released(evidence: Evidence) -> dict[str, Any] | None:
    """Return the released keys of a readable configuration of the released type."""
    if evidence.config is None or not evidence.is_released_type:
        return None
    try:
        return to_release_config(evidence.config)
    except ConfigError:
        # The type has no room for it although it was read from it: all layers are linear, for instance.
        return None


def keys(evidence: Evidence) -> Iterator[Finding]:
    """Name the released keys that other engines miss."""
    released = _released(evidence)
    if released is None:
        return
    given = evidence.given
    missing = [key for key in _NEEDED if given.get(key) is None and released.get(key) is not None]
    if missing:
        affects = {engine for key in missing for engine in _NEEDED[key]}
        if not released["num_experts"] and all("exper" in key or key.startswith("moe_") for key in missing):
            # The others take the absence of experts from the absence of their number.
            affects &= {LLAMA, MLX}
        text = f"config.json has no {', no '.join(missing)} under the released names."
        yield Finding("keys", "error", text, _ordered(affects), "write every released key", fixable=True)
    dtype = given.get("dtype") or given.get("torch_dtype")
    stored = {tensor.dtype for name, tensor in evidence.stored.items() if name == "model.embed_tokens.weight"}
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
    if stored and dtype != names.get(*stored):
        text = f"config.json says dtype {dtype} and the weights are {names.get(*stored)}."
        affects = {TRANSFORMERS, VLLM, SGLANG}
        yield Finding("keys", "warning", text, _ordered(affects), "write the dtype of the weights", fixable=True)


def _ordered(engines: set[str]) -> tuple[str, ...]:
    return tuple(engine for engine in ALL if engine in engines)


def layers(evidence: Evidence) -> Iterator[Finding]:
    """See whether everyone reads the same kinds of layers, and can run them."""
    config, given = evidence.config, evidence.given
    if config is None or not evidence.is_released_type:
        return
    kinds = [block.mixer.kind for block in config.layer_blocks]
    linear = given.get("linear_attn_config") or {}
    listed = linear.get("kda_layers") is not None and linear.get("full_attn_layers") is not None
    if given.get("layer_types") is None and not listed:
        guess = ["mla" if i and i % 4 == 0 else "kda" for i in range(len(kinds))]
        if guess != kinds:
            text = "neither layer_types nor both layer lists are there: transformers guesses another schedule."
            yield Finding("layers", "error", text, (TRANSFORMERS,), "write both", fixable=True)
    if "linear_attn_config" in given and given["linear_attn_config"] is None:
        text = "linear_attn_config is null, which transformers cannot read."
        yield Finding("layers", "error", text, (TRANSFORMERS,), "write the layer lists", fixable=True)
    elif linear and not listed:
        text = "linear_attn_config has one of its two layer lists only."
        yield Finding("layers", "error", text, (VLLM, SGLANG, LLAMA, MLX), "write both", fixable=True)
    if "mla" not in kinds:
        text = "no layer attends: the cache of transformers, and mlx-lm, need one that does."
        yield Finding("layers", "warning", text, (TRANSFORMERS, MLX), "load it with this package")
    if "kda" not in kinds:
        text = "no layer is linear, which mlx-lm expects."
        yield Finding("layers", "warning", text, (MLX,), "load it with another engine")
    if config.tie_embeddings and HEAD not in evidence.stored:
        text = "the output head is the embedding; transformers never ties them and draws a new head at random."
        yield Finding("layers", "error", text, (TRANSFORMERS,), "store the head too", fixable=True)
    heads = {b.mixer.num_heads for b in config.layer_blocks if isinstance(b.mixer, (KDAConfig, MLAConfig))}
    if len(heads) > 1:
        text = f"linear and full attention have different numbers of heads ({sorted(heads)}); llama.cpp expects one."
        yield Finding("layers", "warning", text, (LLAMA,), "load it with another engine")
    routers = {b.ffn.activation for b in config.layer_blocks if isinstance(b.ffn, MoEConfig)}
    if "softmax" in routers:
        text = "the router scores with a softmax; transformers always takes a sigmoid."
        yield Finding("layers", "warning", text, (TRANSFORMERS,), "load it with another engine")
