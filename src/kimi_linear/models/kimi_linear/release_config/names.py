"""What the released type calls our kinds, and every spelling of its keys in circulation. No torch."""

from typing import Any

LAYER_NAMES = {"kda": "linear_attention", "mla": "full_attention"}
FFN_NAMES = {"swiglu": "dense", "moe": "sparse"}

# Released key -> other spellings, in order.
SPELLINGS = {
    "model_max_length": ("max_position_embeddings",),
    "num_experts": ("num_local_experts", "n_routed_experts"),
    "num_experts_per_token": ("num_experts_per_tok", "top_k_experts"),
    "num_shared_experts": ("n_shared_experts",),
    "moe_renormalize": ("norm_topk_prob",),
    "num_expert_group": ("n_group",),
    "moe_router_activation_func": ("scoring_func",),
}
LINEAR_SPELLINGS = {
    "head_dim": "linear_head_dim",
    "num_heads": "linear_num_heads",
    "short_conv_kernel_size": "linear_conv_kernel_dim",
}
# Keys that stand in configurations and change nothing here: bookkeeping, training, and positions that are not used.
_HARMLESS = """
    _attn_implementation_autoset _name_or_path architectures attention_dropout auto_map bos_token_id
    chunk_size_feed_forward dtype eos_token_id ep_size head_dim id2label initializer_range is_encoder_decoder label2id
    max_length num_key_value_heads output_attentions output_hidden_states output_router_logits pad_token_id
    pretraining_tp problem_type qk_head_dim return_dict rope_parameters rope_scaling rope_theta router_aux_loss_coef
    tokenizer_class torch_dtype transformers_version use_cache use_grouped_topk
"""
# Keys that the reader uses or refuses, beside those with several spellings.
_READ = """
    activation_situ_beta activation_situ_linear_beta attention_bias attn_res_block_size compression_config
    first_k_dense_replace hidden_act hidden_size intermediate_size kv_lora_rank latent_moe_use_norm latent_norm_eps
    layer_types linear_attn_config mla_use_nope mla_use_output_gate mlp_layer_types model_type moe_intermediate_size
    moe_layer_freq num_attention_heads num_hidden_layers num_nextn_predict_layers q_lora_rank qk_nope_head_dim
    qk_rope_head_dim quantization_config rms_norm_eps routed_expert_hidden_size routed_scaling_factor
    router_bias_update_rate tie_word_embeddings topk_group topk_method v_head_dim vocab_size
"""
_LINEAR_READ = frozenset(LINEAR_SPELLINGS) | {
    "kda_layers",
    "full_attn_layers",
    "gate_lower_bound",
    "use_full_rank_gate",
}


def unknown_keys(given: dict[str, Any]) -> list[str]:
    """Return the keys of a released configuration that nobody here knows, so that they are seen; they are not read.

    Example:
        >>> unknown_keys({"vocab_size": 8, "sliding_window": 4, "linear_attn_config": {"heads": 2}})
        ['linear_attn_config.heads', 'sliding_window']
    """
    known = {*_HARMLESS.split(), *_READ.split(), *LINEAR_SPELLINGS.values()}
    known = known.union(SPELLINGS, *SPELLINGS.values())
    linear = given.get("linear_attn_config")
    inside = linear.keys() - _LINEAR_READ if isinstance(linear, dict) else set()
    return sorted([*(given.keys() - known), *(f"linear_attn_config.{name}" for name in inside)])
