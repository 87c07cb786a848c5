"""Small configurations of every registered mixer and feed-forward network, for the contract suites."""

from kimi_linear.nn.ffn import FFNS, FFNConfig, MoEConfig, SwiGLUConfig
from kimi_linear.nn.mixers import MIXERS, GDNConfig, GQAConfig, KDAConfig, MixerConfig, MLAConfig

HIDDEN = 24

_MLA = {"num_heads": 3, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}

MIXER_EXAMPLES: dict[str, dict[str, MixerConfig]] = {
    "kda": {
        "equal": KDAConfig(num_heads=2, head_dim=8),
        "grouped": KDAConfig(num_heads=2, head_dim=8, head_v_dim=5, num_v_heads=4, conv_size=3),
        "bounded": KDAConfig(num_heads=2, head_dim=8, gate_lower_bound=-5.0),
    },
    "gdn": {
        "equal": GDNConfig(num_heads=2, head_dim=8),
        "grouped": GDNConfig(num_heads=2, head_dim=8, head_v_dim=5, num_v_heads=4, conv_size=3),
        "paper": GDNConfig(num_heads=2, head_dim=8, full_rank_gate=True, gate_activation="silu"),
    },
    "mla": {
        "nope": MLAConfig(**_MLA),
        "rope": MLAConfig(**_MLA, rope_theta=1e4),
    },
    "gqa": {
        "plain": GQAConfig(num_heads=4, num_kv_heads=2, head_dim=6),
        "window": GQAConfig(num_heads=4, num_kv_heads=2, head_dim=6, window=5, rope_theta=1e4),
        "one token window": GQAConfig(num_heads=2, num_kv_heads=2, head_dim=6, window=1),
        "normed": GQAConfig(num_heads=2, num_kv_heads=1, head_dim=6, rope_theta=1e4, qk_norm=True),
    },
}

FFN_EXAMPLES: dict[str, dict[str, FFNConfig]] = {
    "swiglu": {"plain": SwiGLUConfig(intermediate_size=20)},
    "moe": {
        "shared": MoEConfig(num_experts=6, top_k=2, intermediate_size=10, num_shared_experts=2, scaling=2.446),
        "alone": MoEConfig(num_experts=4, top_k=4, intermediate_size=10, num_shared_experts=0, activation="softmax"),
        "biased": MoEConfig(num_experts=6, top_k=3, intermediate_size=10, scaling=2.446, biased_combine=True),
        "unnormed": MoEConfig(num_experts=5, top_k=1, intermediate_size=10, renormalize=False),
    },
}


def cases(examples: dict[str, dict]) -> dict[str, object]:
    """Return the configurations under "kind-name"."""
    return {f"{kind}-{name}": config for kind, named in examples.items() for name, config in named.items()}


MIXER_CASES = cases(MIXER_EXAMPLES)
FFN_CASES = cases(FFN_EXAMPLES)


def without_examples() -> set[str]:
    """Return the registered kinds that the contract suites would miss."""
    return (set(MIXERS) - set(MIXER_EXAMPLES)) | (set(FFNS) - set(FFN_EXAMPLES))
