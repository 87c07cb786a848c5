"""Write a checkpoint of the released Kimi Linear format as a GGUF file, for llama.cpp. Needs the package gguf.

python benchmarks/gguf_files.py CHECKPOINT FILE.gguf --type bf16       f32, bf16, q8_0 or q4_0

Matrices get the type; vectors, convolutions and the router stay float32, as llama.cpp's own quantiser leaves them. The
output head gets the type too (that quantiser would give it 6 bits in a q4_0 file), so a file is the smallest, and the
fastest, of its name. Names and metadata:

    kimi-linear.attention.head_count_kv   one number a layer; 0 marks Kimi Delta Attention
    blk.N.ssm_a                           -exp(A_log)
    blk.N.attn_k_b, attn_v_b              kv_b_proj, cut into its key part (transposed a head) and its value part
    blk.N.ssm_conv1d_{q,k,v}              [channels, 1, width]
    blk.N.ffn_{gate,up,down}_exps         experts stacked

There is no tokenizer in the checkpoint, and a prompt is given as token ids: the vocabulary is made up.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GGMLType
from safetensors import safe_open

TYPES = {"f32": GGMLType.F32, "bf16": GGMLType.BF16, "q8_0": GGMLType.Q8_0, "q4_0": GGMLType.Q4_0}
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
# Names inside a layer, released -> GGUF; those that need more than a new name are in `convert`.
TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"} | {
    "lm_head.weight": "output.weight"
}
LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.f_a_proj.weight": "ssm_f_a.weight",
    "self_attn.f_b_proj.weight": "ssm_f_b.weight",
    "self_attn.g_a_proj.weight": "ssm_g_a.weight",
    "self_attn.g_b_proj.weight": "ssm_g_b.weight",
    "self_attn.b_proj.weight": "ssm_beta.weight",
    "self_attn.dt_bias": "ssm_dt.bias",
    "self_attn.o_norm.weight": "ssm_norm.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "block_sparse_moe.gate.weight": "ffn_gate_inp.weight",
    "block_sparse_moe.gate.e_score_correction_bias": "exp_probs_b.bias",
    "block_sparse_moe.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "block_sparse_moe.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "block_sparse_moe.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
EXPERTS = {"w1": "ffn_gate_exps.weight", "w3": "ffn_up_exps.weight", "w2": "ffn_down_exps.weight"}
ALWAYS_FLOAT32 = ("ffn_gate_inp", "ssm_conv1d", "ssm_a", "exp_probs_b")


def read_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint directory in float32."""
    tensors = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors.update({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
    return tensors


def convert(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every GGUF tensor by name, in float32."""
    for name, target in TOP.items():
        if name in tensors:
            yield target, tensors[name]
    for number, kind in enumerate(config["layer_types"]):
        own = {k.removeprefix(f"model.layers.{number}."): v for k, v in tensors.items() if f".layers.{number}." in k}
        block = f"blk.{number}."
        for name, target in LAYER.items():
            if name in own:
                yield block + target, own[name]
        if kind == "linear_attention":
            yield block + "ssm_a", -own["self_attn.A_log"].exp()
            for letter in "qkv":
                yield f"{block}ssm_conv1d_{letter}.weight", own[f"self_attn.{letter}_conv1d.weight"].unsqueeze(0)
        else:
            key, value = split_latent(config, own["self_attn.kv_b_proj.weight"])
            yield block + "attn_k_b.weight", key
            yield block + "attn_v_b.weight", value
        if "block_sparse_moe.gate.weight" in own:
            for part, target in EXPERTS.items():
                names = [f"block_sparse_moe.experts.{e}.{part}.weight" for e in range(config["num_experts"])]
                yield block + target, torch.stack([own[name] for name in names])


def split_latent(config: dict[str, Any], kv_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return kv_b_proj [H (nope + V), R] as its key part [H, R, nope] and its value part [H, V, R]."""
    nope, V = config["qk_nope_head_dim"], config["v_head_dim"]
    key, value = kv_b.unflatten(0, (config["num_attention_heads"], nope + V)).split([nope, V], dim=1)
    return key.transpose(1, 2).contiguous(), value.contiguous()


def add_metadata(writer: gguf.GGUFWriter, config: dict[str, Any], kind: str) -> None:
    """Write the keys llama.cpp needs to build the network."""
    linear = config["linear_attn_config"]
    rope, rank = config["qk_rope_head_dim"], config["kv_lora_rank"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["model_max_length"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    # The latent cache is read as one key/value head that all queries share.
    writer.add_head_count_kv([0 if t == "linear_attention" else 1 for t in config["layer_types"]])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_ssm_conv_kernel(linear["short_conv_kernel_size"])
    writer.add_kda_head_dim(linear["head_dim"])
    writer.add_kv_lora_rank(rank)
    writer.add_rope_dimension_count(rope)
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_token"])
    writer.add_expert_shared_count(config["num_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["moe_renormalize"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Write a made-up byte-level vocabulary: 256 bytes, then names; the last token ends a text."""
    # The printable alphabet in which byte-level vocabularies spell bytes.
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spelled = [chr(b) for b in plain] + [chr(256 + n) for n in range(256 - len(plain))]
    tokens = [*[*spelled, *(f"t{n}" for n in range(size))][: size - 1], "<end>"]
    kinds = [gguf.TokenType.NORMAL] * (size - 1) + [gguf.TokenType.CONTROL]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{spelled[0]} {spelled[1]}"])
    writer.add_bos_token_id(size - 1)
    writer.add_eos_token_id(size - 1)
    writer.add_add_bos_token(False)


def stored_type(name: str, tensor: torch.Tensor, kind: str) -> GGMLType:
    """Return the type a tensor gets in a file of a kind; rows that are no whole number of its blocks stay float32."""
    block = gguf.GGML_QUANT_SIZES[TYPES[kind]][0]
    if tensor.dim() < 2 or tensor.shape[-1] % block or any(part in name for part in ALWAYS_FLOAT32) or "norm" in name:
        return GGMLType.F32
    return TYPES[kind]


def write(checkpoint: Path, target: Path, kind: str) -> None:
    """Write one GGUF file."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.KIMI_LINEAR])
    writer.add_name("random weights")
    add_metadata(writer, config, kind)
    add_vocabulary(writer, config["vocab_size"])
    for name, tensor in convert(config, read_tensors(checkpoint)):
        stored = stored_type(name, tensor, kind)
        array = np.ascontiguousarray(tensor.numpy())
        writer.add_tensor(name, gguf.quants.quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--type", choices=list(TYPES), default="bf16")
    arguments = parser.parse_args()
    write(arguments.checkpoint, arguments.target, arguments.type)
    print(f"{arguments.target}: {arguments.target.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
