"""A model's modules as the native step wants them described: packed matrices, float32 vectors, sizes and offsets."""

import ctypes
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kimi_linear.inference.native import structs
from kimi_linear.nn.block import Block
from kimi_linear.nn.decoder import Decoder
from kimi_linear.nn.ffn.moe import Experts, MixtureOfExperts
from kimi_linear.nn.ffn.swiglu import SwiGLU
from kimi_linear.nn.mixers.kda.layer import KimiDeltaAttention
from kimi_linear.nn.mixers.mla.layer import MultiHeadLatentAttention
from kimi_linear.nn.residual.standard import StandardResidual
from kimi_linear.ops.linear.packed import PackedLinear, WeightFormat, panel_width
from kimi_linear.ops.native.library import DTYPES

MIXER_KINDS: dict[type, int] = {KimiDeltaAttention: 0, MultiHeadLatentAttention: 1}
FFN_KINDS: dict[type, int] = {SwiGLU: 0, MixtureOfExperts: 1}


@dataclasses.dataclass
class Described:
    """A struct for the native code, and all that its pointers point to."""

    struct: Any
    kept: list[Any]


class Parts:
    """What describing a network collects: packed weights, and which modules they stand in for.

    Fields: `format`, what weights are packed as; `products`, packed weights of linear layers; `experts`, the two packed
    weights of stacked experts; `replaced`, the parameters that are no longer read, with the module that owns them.
    """

    def __init__(self, format: WeightFormat) -> None:
        self.format = format
        self.products: dict[nn.Module, PackedLinear] = {}
        self.experts: dict[Experts, structs.MoeLayer] = {}
        self.replaced: list[tuple[nn.Module, str]] = []

    def pack(self, weights: Iterable[Tensor], kept: list[Any]) -> PackedLinear:
        """Pack weights, one below the other, into memory that lives as long as `kept`."""
        packed = PackedLinear(torch.cat([*weights]), format=self.format)
        kept.append(packed)
        return packed

    def stack(self, modules: Sequence[nn.Linear], kept: list[Any]) -> tuple[structs.PackedWeight, list[int]]:
        """Pack linear layers into one weight, each from a panel on; return it with their offsets."""
        padded = [_padded(module.weight) for module in modules]
        packed = self.pack(padded, kept)
        offsets = [sum(part.shape[0] for part in padded[:i]) for i in range(len(padded))]
        for module, offset in zip(modules, offsets, strict=True):
            self._replace(module, packed.outputs(offset, module.out_features))
        return structs.PackedWeight.of(packed), offsets

    def one(self, module: nn.Linear, kept: list[Any]) -> structs.PackedWeight:
        """Pack one linear layer."""
        return self.stack([module], kept)[0]

    def per_head(self, module: nn.Linear, heads: int, kept: list[Any]) -> structs.PackedWeight:
        """Pack one linear layer, with the outputs of each head from a panel on."""
        if module.out_features // heads % panel_width() == 0:
            return self.one(module, kept)
        self._replace(module, PackedLinear(module.weight, format=self.format))
        return structs.PackedWeight.of(self.pack([_padded(part) for part in module.weight.chunk(heads)], kept))

    def _replace(self, module: nn.Linear, packed: PackedLinear) -> None:
        self.products[module] = packed
        self.replaced.append((module, "weight"))


def reasons_against(decoder: Decoder) -> list[str]:
    """Return why the native step cannot run a network; empty if it can."""
    reasons = []
    if not isinstance(decoder.residual, StandardResidual):
        reasons.append(f"its residual is {type(decoder.residual).__name__}")
    for index, block in enumerate(decoder.blocks()):
        if type(block.self_attn) not in MIXER_KINDS:
            reasons.append(f"layer {index} mixes with {type(block.self_attn).__name__}")
        if type(block.mlp) not in FFN_KINDS:
            reasons.append(f"layer {index} has the feed-forward network {type(block.mlp).__name__}")
        if isinstance(block.mlp, MixtureOfExperts) and block.mlp.config.biased_combine:
            reasons.append(f"layer {index} weighs experts with the selection bias")
    return reasons


def _round_up(size: int) -> int:
    """Return a number of outputs, rounded up to whole panels."""
    return -(-size // panel_width()) * panel_width()


def _padded(weight: Tensor) -> Tensor:
    return nn.functional.pad(weight.detach(), (0, 0, 0, -weight.shape[0] % panel_width()))


def _floats(tensor: Tensor, kept: list[Any]) -> int:
    """Return the address of a float32 copy that lives as long as `kept`."""
    kept.append(tensor.detach().to(torch.float32, copy=True).contiguous())
    return int(kept[-1].data_ptr())


def describe_kda(layer: KimiDeltaAttention, parts: Parts) -> Described:
    """Describe a Kimi Delta Attention mixer."""
    c, kept = layer.config, list[Any]()
    names = ("q_proj", "k_proj", "v_proj", "f_a_proj", "g_a_proj", "b_proj")
    stacked, offsets = parts.stack([getattr(layer, name) for name in names], kept)
    struct = structs.KdaLayer(
        in_=stacked,
        decay=parts.per_head(layer.f_b_proj, c.value_heads, kept),
        gate=parts.per_head(layer.g_b_proj, c.value_heads, kept),
        out=parts.one(layer.o_proj, kept),
        conv_q=_floats(layer.q_conv1d.weight, kept),
        conv_k=_floats(layer.k_conv1d.weight, kept),
        conv_v=_floats(layer.v_conv1d.weight, kept),
        rate=_floats(layer.A_log.detach().double().exp(), kept),
        dt_bias=_floats(layer.dt_bias, kept),
        out_norm=_floats(layer.o_norm.weight, kept),
        H=c.num_heads,
        HV=c.value_heads,
        K=c.head_dim,
        V=c.value_dim,
        W=c.conv_size,
        decay_rows=_round_up(c.head_dim),
        gate_rows=_round_up(c.value_dim),
        **dict(zip(("at_k", "at_v", "at_decay", "at_gate", "at_beta"), offsets[1:], strict=True)),
        lower_bound=c.gate_lower_bound or 0.0,
        scale=c.head_dim**-0.5,
        out_eps=layer.o_norm.eps,
    )
    return Described(struct, kept)


def describe_mla(layer: MultiHeadLatentAttention, parts: Parts) -> Described:
    """Describe a latent attention mixer. Its kv_b_proj, which works on heads one by one, is never quantised."""
    c, kept = layer.config, list[Any]()
    kv_b = layer.kv_b_proj.weight.detach().contiguous()
    kept.append(kv_b)
    frequencies = None
    if c.rope_theta is not None:
        half = c.qk_rope_head_dim // 2
        kept.append(c.rope_theta ** -(torch.arange(half, dtype=torch.float64) / half))
        frequencies = kept[-1].data_ptr()
    stacked, offsets = parts.stack([layer.q_proj, layer.kv_a_proj_with_mqa], kept)
    struct = structs.MlaLayer(
        in_=stacked,
        out=parts.one(layer.o_proj, kept),
        kv_b=kv_b.data_ptr(),
        latent_norm=_floats(layer.kv_a_layernorm.weight, kept),
        frequencies=frequencies,
        H=c.num_heads,
        R=c.kv_lora_rank,
        dn=c.qk_nope_head_dim,
        dr=c.qk_rope_head_dim,
        dv=c.v_head_dim,
        kv_dtype=DTYPES[kv_b.dtype],
        at_latent=offsets[1],
        latent_eps=layer.kv_a_layernorm.eps,
        scale=c.qk_head_dim**-0.5,
    )
    return Described(struct, kept)


def describe_swiglu(layer: SwiGLU, parts: Parts) -> Described:
    """Describe a dense feed-forward network."""
    kept = list[Any]()
    stacked, offsets = parts.stack([layer.gate_proj, layer.up_proj], kept)
    down = parts.one(layer.down_proj, kept)
    return Described(
        structs.SwiGluLayer(in_=stacked, down=down, F=layer.config.intermediate_size, at_up=offsets[1]), kept
    )


def describe_moe(layer: MixtureOfExperts, parts: Parts) -> Described:
    """Describe a mixture of experts."""
    c, kept, weights = layer.config, list[Any](), layer.experts
    shared = structs.SwiGluLayer()
    if layer.shared_experts is not None:
        described = describe_swiglu(layer.shared_experts, parts)
        kept.append(described)
        shared = described.struct
    up = parts.pack((_padded(w) for pair in zip(weights.w1, weights.w3, strict=True) for w in pair), kept)
    down = parts.pack((_padded(w) for w in weights.w2), kept)
    width = _round_up(c.intermediate_size)
    struct = structs.MoeLayer(
        in_=structs.PackedWeight.of(up),
        down=structs.PackedWeight.of(down),
        shared=shared,
        router=_floats(layer.gate.weight, kept),
        bias=_floats(layer.gate.e_score_correction_bias, kept),
        E=c.num_experts,
        k=c.top_k,
        F=c.intermediate_size,
        at_up=width,
        in_rows=2 * width,
        down_rows=_round_up(weights.w2.shape[1]),
        softmax=c.activation == "softmax",
        renormalize=c.renormalize,
        scaling=c.scaling,
    )
    parts.experts[weights] = struct
    parts.replaced += [(weights, name) for name in ("w1", "w3", "w2")]
    return Described(struct, kept)


def _describe_part(part: nn.Module, parts: Parts) -> Described:
    if isinstance(part, KimiDeltaAttention):
        return describe_kda(part, parts)
    if isinstance(part, MultiHeadLatentAttention):
        return describe_mla(part, parts)
    if isinstance(part, MixtureOfExperts):
        return describe_moe(part, parts)
    assert isinstance(part, SwiGLU), part
    return describe_swiglu(part, parts)


def describe_block(block: Block, parts: Parts) -> Described:
    """Describe one layer."""
    kept = list[Any]()
    mixer, ffn = _describe_part(block.self_attn, parts), _describe_part(block.mlp, parts)
    struct = structs.Layer(
        mixer_norm=_floats(block.input_layernorm.weight, kept),
        ffn_norm=_floats(block.post_attention_layernorm.weight, kept),
        mixer_kind=MIXER_KINDS[type(block.self_attn)],
        ffn_kind=FFN_KINDS[type(block.mlp)],
        mixer=ctypes.addressof(mixer.struct),
        ffn=ctypes.addressof(ffn.struct),
    )
    return Described(struct, [*kept, mixer, ffn])


def describe_model(decoder: Decoder, head: PackedLinear, parts: Parts) -> Described:
    """Describe a network and its output head."""
    blocks = [describe_block(block, parts) for block in decoder.blocks()]
    layers = (structs.Layer * len(blocks))(*(block.struct for block in blocks))
    kept: list[Any] = [blocks, layers, head]
    embedding = decoder.embed_tokens.weight
    kept.append(embedding)
    struct = structs.Model(
        layers=ctypes.addressof(layers),
        embedding=embedding.data_ptr(),
        norm=_floats(decoder.norm.weight, kept),
        head=structs.PackedWeight.of(head),
        num_layers=len(blocks),
        D=embedding.shape[1],
        embedding_dtype=DTYPES[embedding.dtype],
        norm_eps=decoder.norm.eps,
    )
    return Described(struct, kept)
