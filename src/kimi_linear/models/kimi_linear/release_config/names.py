"""What the released type calls our kinds, and every spelling of its keys in circulation. No torch."""

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
