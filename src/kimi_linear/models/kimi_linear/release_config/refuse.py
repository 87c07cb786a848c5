"""What in a configuration describes another network than ours, or contradicts itself; field by field. No torch.

Kimi-K3's text tower carries the same model type and architecture name, and so may anything that was made from the
released code. A field of other mathematics is refused with its reason, never ignored.
"""

from collections.abc import Callable
from typing import Any

from kimi_linear.base.errors import ConfigError, shown
from kimi_linear.models.kimi_linear.release_config.names import LINEAR_SPELLINGS, SPELLINGS


def _never(value: Any) -> bool:
    return False


def _is(*allowed: Any) -> Callable[[Any], bool]:
    return lambda value: value in allowed


# Key, which values (beside none) are ours, and what any other one means.
_FIELDS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("attn_res_block_size", _never, "Kimi-K3's attention over depth instead of a sum of residuals"),
    ("hidden_act", _is("silu"), "another activation than SwiGLU's; Kimi-K3 has 'situ'"),
    ("activation_situ_beta", _never, "a parameter of Kimi-K3's activation"),
    ("activation_situ_linear_beta", _never, "a parameter of Kimi-K3's activation"),
    ("routed_expert_hidden_size", _never, "Kimi-K3's experts in a space narrower than the model"),
    ("latent_moe_use_norm", _is(False), "Kimi-K3's norm in front of its narrower experts"),
    ("mla_use_output_gate", _is(False), "Kimi-K3's output gate on latent attention"),
    ("q_lora_rank", _never, "low-rank queries, q_a_proj and q_b_proj"),
    ("linear_attn_config.gate_lower_bound", _never, "a bounded decay gate, other mathematics than softplus"),
    ("linear_attn_config.use_full_rank_gate", _is(False), "one full-rank output gate instead of a low-rank one"),
    ("mla_use_nope", _is(True), "rotary positions in latent attention"),
    ("attention_bias", _is(False), "biases on the attention projections"),
    ("num_nextn_predict_layers", _is(0), "layers that predict further tokens"),
    ("moe_layer_freq", _is(1), "experts at some layers only"),
    ("num_expert_group", _is(1), "experts chosen by groups"),
    ("topk_group", _is(1), "experts chosen by groups"),
    ("topk_method", _is("noaux_tc"), "another rule for choosing experts"),
    ("quantization_config", _never, "quantized weights, which are not read; give a bfloat16 or float32 checkpoint"),
    ("compression_config", _never, "quantized weights, which are not read; give a bfloat16 or float32 checkpoint"),
)


def linear_part(given: dict[str, Any]) -> dict[str, Any]:
    """Return linear_attn_config, empty if there is none."""
    linear = given.get("linear_attn_config") or {}
    if not isinstance(linear, dict):
        raise ConfigError(f"linear_attn_config is {shown(linear)}, expected an object with the layer lists and sizes.")
    return linear


def find(given: dict[str, Any], name: str, default: Any = None) -> Any:
    """Return the value of a released key under any of its spellings."""
    values = [given[spelling] for spelling in _spellings(name) if given.get(spelling) is not None]
    return values[0] if values else default


def _spellings(name: str) -> tuple[str, ...]:
    return (name, *SPELLINGS.get(name, ()))


def refuse_other_models(given: dict[str, Any]) -> None:
    """Raise ConfigError for every field that is not of this network, in one sentence with a reason each."""
    if given.get("model_type") != "kimi_linear":
        model_type = shown(given.get("model_type"))
        raise ConfigError(f"model_type is {model_type}, expected 'kimi_linear'; this is another model.")
    linear, found = linear_part(given), []
    for key, is_ours, reason in _FIELDS:
        inner = key.removeprefix("linear_attn_config.")
        value = find(given, key) if inner == key else linear.get(inner)
        if value is not None and not is_ours(value):
            found.append(f"{key} is {_short(value)} ({reason})")
    if found:
        raise ConfigError(
            f"the model type is 'kimi_linear' and the network another: {'; '.join(found)}; nothing of this is "
            "supported, so load a Kimi Linear checkpoint."
        )


def refuse_contradictions(given: dict[str, Any]) -> None:
    """Raise ConfigError if two spellings of one key have different values; names every such pair."""
    linear, found = linear_part(given), []
    for key in SPELLINGS:
        found += _differing({name: given.get(name) for name in _spellings(key)})
    for inner, flat in LINEAR_SPELLINGS.items():
        found += _differing({f"linear_attn_config.{inner}": linear.get(inner), flat: given.get(flat)})
    if found:
        raise ConfigError(f"two spellings of one key disagree: {'; '.join(found)}; remove the wrong one.")


def _differing(values: dict[str, Any]) -> list[str]:
    there = [(name, value) for name, value in values.items() if value is not None]
    return [
        f"{there[0][0]} is {_short(there[0][1])} and {name} is {_short(value)}"
        for name, value in there[1:]
        if value != there[0][1]
    ]


def _short(value: Any) -> str:
    if isinstance(value, dict) and "quant_method" in value:
        return repr(value["quant_method"])
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
