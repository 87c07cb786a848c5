"""Named configurations: a size, and its two baselines of the same shape. No torch.

Every size exists three times: `<size>` (3 Kimi Delta Attention layers to 1 latent attention), `<size>-gdn` (Gated
DeltaNet in place of Kimi Delta Attention, same heads) and `<size>-mla` (latent attention everywhere).

Sizes:
    tiny: every kind of layer in 0.3 million parameters, for tests.
    demo: trained in minutes on two CPU cores.
    150m, 300m, 1b: small models; the name is about the total number of parameters. 300m is the shape that
        benchmarks/ measures other engines beside; its widths are multiples of 256, the block of every quantised format.
    48b-a3b: the released moonshotai/Kimi-Linear-48B-A3B.
    scaling-653m ... scaling-1.7b: the scaling study of arXiv:2510.26692; the name is the number of active parameters.

Published of the scaling study: hidden size, layers, heads (equal to the layers), 8 of 64 experts, 4096 tokens of
context, and the active parameters that name it. Chosen here: everything else as in the released model (head
dims, latent rank, vocabulary, one shared expert, first layer dense), and the expert width, a multiple of 8, such that
the active parameters with the output head and without the embedding come nearest the name; it lies between 0.41 and
0.46 of the hidden size, where the released model has 0.44. The dense layer is as wide as the nine active experts
together, as in the released model.
"""

import dataclasses

from kimi_linear.base.errors import ConfigError
from kimi_linear.base.registry import unknown_name
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.nn.config import BlockConfig
from kimi_linear.nn.ffn import MoEConfig, SwiGLUConfig
from kimi_linear.nn.mixers import GDNConfig, KDAConfig, MixerConfig, MLAConfig
from kimi_linear.nn.placement import hybrid, with_dense_start


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """What the three variants of one size share; the first layer's ffn is dense."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    kda: KDAConfig
    mla: MLAConfig
    moe: MoEConfig
    dense_width: int
    max_length: int
    special_tokens: tuple[int, int, int] | None = None


def _released_mla(num_heads: int) -> MLAConfig:
    return MLAConfig(num_heads=num_heads, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)


def _study(hidden_size: int, num_layers: int, expert_width: int) -> Size:
    return Size(
        vocab_size=163840,
        hidden_size=hidden_size,
        num_layers=num_layers,
        kda=KDAConfig(num_heads=num_layers, head_dim=128),
        mla=_released_mla(num_layers),
        moe=MoEConfig(num_experts=64, top_k=8, intermediate_size=expert_width, scaling=2.446),
        dense_width=9 * expert_width,
        max_length=4096,
        special_tokens=(163584, 163586, 163839),
    )


SIZES: dict[str, Size] = {
    "tiny": Size(
        vocab_size=256,
        hidden_size=64,
        num_layers=4,
        kda=KDAConfig(num_heads=4, head_dim=16),
        mla=MLAConfig(num_heads=4, kv_lora_rank=16, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32),
        moe=MoEConfig(num_experts=8, top_k=2, intermediate_size=32, scaling=2.446),
        dense_width=96,
        max_length=256,
    ),
    "demo": Size(
        vocab_size=4096,
        hidden_size=128,
        num_layers=4,
        kda=KDAConfig(num_heads=4, head_dim=32),
        mla=MLAConfig(num_heads=4, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32),
        moe=MoEConfig(num_experts=16, top_k=4, intermediate_size=64),
        dense_width=384,
        max_length=4096,
    ),
    "150m": Size(
        vocab_size=32768,
        hidden_size=640,
        num_layers=12,
        kda=KDAConfig(num_heads=10, head_dim=64),
        mla=MLAConfig(num_heads=10, kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64),
        moe=MoEConfig(num_experts=16, top_k=4, intermediate_size=240, scaling=2.446),
        dense_width=1200,
        max_length=4096,
    ),
    "300m": Size(
        vocab_size=32768,
        hidden_size=1024,
        num_layers=8,
        kda=KDAConfig(num_heads=8, head_dim=128),
        mla=_released_mla(8),
        moe=MoEConfig(num_experts=16, top_k=4, intermediate_size=512, scaling=2.446),
        dense_width=2048,
        max_length=1048576,
    ),
    "1b": Size(
        vocab_size=65536,
        hidden_size=1536,
        num_layers=16,
        kda=KDAConfig(num_heads=12, head_dim=128),
        mla=_released_mla(12),
        moe=MoEConfig(num_experts=32, top_k=8, intermediate_size=272, scaling=2.446),
        dense_width=2448,
        max_length=8192,
    ),
    "48b-a3b": Size(
        vocab_size=163840,
        hidden_size=2304,
        num_layers=27,
        kda=KDAConfig(num_heads=32, head_dim=128),
        mla=_released_mla(32),
        moe=MoEConfig(num_experts=256, top_k=8, intermediate_size=1024, scaling=2.446),
        dense_width=9216,
        max_length=1048576,
        special_tokens=(163584, 163586, 163839),
    ),
    "scaling-653m": _study(1216, 16, 544),
    "scaling-878m": _study(1376, 18, 624),
    "scaling-1.1b": _study(1536, 20, 632),
    "scaling-1.4b": _study(1632, 22, 744),
    "scaling-1.7b": _study(1776, 24, 768),
}


def _gdn_like(kda: KDAConfig) -> GDNConfig:
    """Return the Gated DeltaNet of the same heads, dims and output gate."""
    return GDNConfig(
        num_heads=kda.num_heads,
        head_dim=kda.head_dim,
        head_v_dim=kda.head_v_dim,
        num_v_heads=kda.num_v_heads,
        conv_size=kda.conv_size,
        norm_eps=kda.norm_eps,
    )


def _assemble(size: Size, mixers: dict[str, MixerConfig], layers: tuple[str, ...]) -> KimiLinearConfig:
    dense = SwiGLUConfig(intermediate_size=size.dense_width)
    placed = with_dense_start(layers, 1)
    blocks = {
        name: BlockConfig(mixer=mixers[name.removesuffix("_dense")], ffn=dense if name.endswith("_dense") else size.moe)
        for name in dict.fromkeys(placed)
    }
    bos, eos, pad = size.special_tokens or (None, None, None)
    return KimiLinearConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        blocks=blocks,
        layers=placed,
        max_length=size.max_length,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )


def build_size(size: Size, variant: str = "kda") -> KimiLinearConfig:
    """Return the configuration of a size in one variant: "kda", "gdn" or "mla".

    Example:
        >>> import dataclasses
        >>> narrow = dataclasses.replace(SIZES["demo"], num_layers=4)
        >>> build_size(narrow).layers
        ('kda_dense', 'kda', 'kda', 'mla')
    """
    if variant == "kda":
        return _assemble(size, {"kda": size.kda, "mla": size.mla}, hybrid(size.num_layers))
    if variant == "gdn":
        return _assemble(size, {"gdn": _gdn_like(size.kda), "mla": size.mla}, hybrid(size.num_layers, linear="gdn"))
    if variant == "mla":
        return _assemble(size, {"mla": size.mla}, ("mla",) * size.num_layers)
    raise ConfigError(unknown_name("variant", variant, ["kda", "gdn", "mla"]))


PRESETS: dict[str, tuple[str, str]] = {
    name if variant == "kda" else f"{name}-{variant}": (name, variant)
    for name in SIZES
    for variant in ("kda", "gdn", "mla")
}


def preset(name: str) -> KimiLinearConfig:
    """Return a configuration by name; an unknown name is a ConfigError that names the nearest known one.

    Example:
        >>> preset("tiny-mla").layers
        ('mla_dense', 'mla', 'mla', 'mla')
    """
    if name not in PRESETS:
        raise ConfigError(unknown_name("preset", name, list(PRESETS)))
    size, variant = PRESETS[name]
    return build_size(SIZES[size], variant)
