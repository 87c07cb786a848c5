"""Random models of awkward shapes that the released type can hold: what every other engine must agree with us on."""

from dataclasses import replace

import torch

from kimi_linear.causal_lm import KimiLinearForCausalLM
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.nn.config import BlockConfig
from kimi_linear.nn.ffn import MoEConfig, SwiGLUConfig
from kimi_linear.nn.mixers import KDAConfig, MLAConfig


def build(
    kda: KDAConfig, mla: MLAConfig, moe: MoEConfig, dense: int, schedule: str, **sizes: object
) -> KimiLinearConfig:
    """Return a configuration from a schedule with one letter a layer: k or m, capital where the layer has experts."""
    mixers, ffns = {"k": kda, "m": mla}, {False: SwiGLUConfig(intermediate_size=dense), True: moe}
    blocks = {letter: BlockConfig(mixer=mixers[letter.lower()], ffn=ffns[letter.isupper()]) for letter in set(schedule)}
    return KimiLinearConfig(blocks=blocks, layers=tuple(schedule), **sizes)  # type: ignore[arg-type]


def _mla(heads: int, rank: int, nope: int, rope: int, value: int) -> MLAConfig:
    return MLAConfig(num_heads=heads, kv_lora_rank=rank, qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=value)


AWKWARD: dict[str, KimiLinearConfig] = {
    # Odd head counts, a key dim that is no power of two, values wider than keys.
    "odd-heads": build(
        KDAConfig(num_heads=3, head_dim=16),
        _mla(5, 24, 12, 8, 20),
        MoEConfig(num_experts=5, top_k=2, intermediate_size=24, scaling=2.446),
        *(56, "kKMK"),
        vocab_size=131,
        hidden_size=80,
        eos_token_id=2,
    ),
    # The first layer attends; no dense layer; three experts, one chosen; two shared experts.
    "first-mla": build(
        KDAConfig(num_heads=2, head_dim=32),
        _mla(4, 32, 16, 16, 16),
        MoEConfig(num_experts=3, top_k=1, intermediate_size=40, num_shared_experts=2),
        *(64, "MKKMK"),
        vocab_size=257,
        hidden_size=64,
        eos_token_id=2,
    ),
    # Two dense layers, tied embeddings, many experts, the released tail: the last layer attends out of turn.
    "two-dense": build(
        KDAConfig(num_heads=4, head_dim=16),
        _mla(4, 16, 16, 8, 16),
        MoEConfig(num_experts=16, top_k=4, intermediate_size=32, scaling=2.446),
        *(96, "kkKMKKM"),
        vocab_size=300,
        hidden_size=96,
        tie_embeddings=True,
        eos_token_id=2,
    ),
    # KDA as wide as the model is not; one MLA head; softmax routing without renormalisation; another epsilon.
    "wide-keys": build(
        KDAConfig(num_heads=5, head_dim=32, norm_eps=1e-6),
        _mla(1, 64, 32, 16, 32),
        MoEConfig(num_experts=7, top_k=3, intermediate_size=32, activation="softmax", renormalize=False),
        *(80, "kMKK"),
        vocab_size=160,
        hidden_size=48,
        norm_eps=1e-6,
        eos_token_id=2,
    ),
    # A shorter convolution; all layers but one attend; every expert is chosen.
    "mostly-mla": build(
        KDAConfig(num_heads=1, head_dim=64, conv_size=3),
        _mla(3, 48, 24, 8, 16),
        MoEConfig(num_experts=4, top_k=4, intermediate_size=48, scaling=0.5),
        *(72, "mMKM"),
        vocab_size=199,
        hidden_size=72,
        eos_token_id=2,
    ),
    # Weights of the experts that do not sum to one; three dense layers, the third of which attends.
    "unnormalised": build(
        KDAConfig(num_heads=6, head_dim=16),
        _mla(2, 40, 20, 4, 24),
        MoEConfig(num_experts=6, top_k=3, intermediate_size=24, scaling=1.5, renormalize=False),
        *(88, "kkmKKM"),
        vocab_size=141,
        hidden_size=52,
        eos_token_id=2,
    ),
    # The released proportions: 27 layers in its order, key slices of 192 and values of 128 in small.
    "released-order": build(
        KDAConfig(num_heads=2, head_dim=16),
        _mla(2, 32, 16, 8, 16),
        MoEConfig(num_experts=8, top_k=2, intermediate_size=16, scaling=2.446),
        *(64, "k" + "KKM" + "KKKM" * 5 + "KKM"),
        vocab_size=163,
        hidden_size=36,
        eos_token_id=2,
        pad_token_id=0,
    ),
}
# What each is stored in; all engines compute in float32 from it.
STORED = {
    "odd-heads": torch.float32,
    "first-mla": torch.bfloat16,
    "two-dense": torch.float32,
    "wide-keys": torch.float16,
    "mostly-mla": torch.float32,
    "unnormalised": torch.bfloat16,
    "released-order": torch.bfloat16,
}


def lively_model(name: str, config: KimiLinearConfig | None = None) -> KimiLinearForCausalLM:
    """Return a model of one of the shapes, or of a variant of it, in its dtype; every parameter matters to the result.

    Matrices keep the size of what they multiply; norms are not one, router biases decide, and decays differ.
    """
    config = config or AWKWARD[name]
    model = KimiLinearForCausalLM(config, generator=torch.Generator().manual_seed(7))
    draw = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=draw)
            if key.endswith(("A_log", "dt_bias")):
                tensor.add_(0.3 * noise)
            elif key.endswith("e_score_correction_bias"):
                tensor.copy_((0.1 * noise).bfloat16())
            elif tensor.dim() == 1:
                tensor.copy_(1 + 0.2 * noise)
            elif "embed_tokens" in key:
                tensor.copy_(noise * config.hidden_size**-0.25)
            else:
                tensor.copy_(noise * tensor.shape[-1] ** -0.5)
        if config.pad_token_id is not None:
            model.model.embed_tokens.weight[config.pad_token_id] = 0
    model.to(STORED[name])
    return model.eval()


def prompt(name: str, length: int = 19) -> torch.Tensor:
    """Return token ids [1, length] of a shape's vocabulary, the pad token not among them."""
    draw = torch.Generator().manual_seed(11)
    return torch.randint(3, AWKWARD[name].vocab_size, (1, length), generator=draw)


def with_latent_norm_eps(config: KimiLinearConfig, eps: float) -> KimiLinearConfig:
    """Return the configuration with another epsilon of the latent norm; engines differ in it."""
    blocks = {
        name: replace(block, mixer=replace(block.mixer, latent_norm_eps=eps))
        if isinstance(block.mixer, MLAConfig)
        else block
        for name, block in config.blocks.items()
    }
    return replace(config, blocks=blocks)
