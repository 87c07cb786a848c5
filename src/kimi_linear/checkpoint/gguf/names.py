"""GGUF's tensors as data: which of them holds which release tensor, for both directions. No torch.

    token_embd, output_norm, output         output is there in a model with tied embeddings too
    blk.N.attn_k_b [H, R, nope]             kv_b_proj's key part, transposed a head
    blk.N.attn_v_b [H, V, R]                kv_b_proj's value part
    blk.N.ffn_{gate,up,down}_exps           experts stacked
    blk.N.ssm_conv1d_{q,k,v} [1, C, 1, W]   convolutions
    blk.N.ssm_a [1, 1, H, 1]                -exp(A_log): the one tensor whose numbers change

Shapes are written slowest axis first, as everywhere here; the file has them the other way round.
"""

import re

from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.models.kimi_linear.dialects import Move
from kimi_linear.models.kimi_linear.keys import KeyMap, key_maps
from kimi_linear.nn.mixers import MLAConfig

GGUF = "gguf"
DECAY = "ssm_a"
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"

_TOP = {
    "model.embed_tokens.weight": EMBEDDING,
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": OUTPUT,
}
# Names inside a layer: of our module, and of GGUF.
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_conv1d.weight": "ssm_conv1d_q.weight",
    "self_attn.k_conv1d.weight": "ssm_conv1d_k.weight",
    "self_attn.v_conv1d.weight": "ssm_conv1d_v.weight",
    "self_attn.f_a_proj.weight": "ssm_f_a.weight",
    "self_attn.f_b_proj.weight": "ssm_f_b.weight",
    "self_attn.g_a_proj.weight": "ssm_g_a.weight",
    "self_attn.g_b_proj.weight": "ssm_g_b.weight",
    "self_attn.b_proj.weight": "ssm_beta.weight",
    "self_attn.dt_bias": "ssm_dt.bias",
    "self_attn.A_log": DECAY,
    "self_attn.o_norm.weight": "ssm_norm.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.experts.w1": "ffn_gate_exps.weight",
    "mlp.experts.w2": "ffn_down_exps.weight",
    "mlp.experts.w3": "ffn_up_exps.weight",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
_ALWAYS_FLOAT32 = ("ffn_gate_inp.", "ssm_conv1d_", DECAY)


def gguf_moves(config: KimiLinearConfig) -> list[Move]:
    """Return what every GGUF tensor is made of, its pieces in the order of the file.

    Example:
        >>> from kimi_linear.models.kimi_linear.presets import preset
        >>> gguf_moves(preset("tiny"))[1].stored
        'blk.0.attn_norm.weight'
    """
    moves = []
    for key in key_maps(config):
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", key.module)
        if layer is None:
            moves.append(_whole(key, _TOP[key.module]))
            continue
        block, name = f"blk.{layer[1]}.", layer[2]
        if name == "self_attn.kv_b_proj.weight":
            mixer = config.layer_blocks[int(layer[1])].mixer
            assert isinstance(mixer, MLAConfig)
            moves += _latent_up(block, key, mixer)
        elif key.is_stacked:
            moves += [Move(block + _LAYER[name], key.shape, r, GGUF, (e,)) for e, r in enumerate(key.release)]
        else:
            moves.append(_whole(key, block + _LAYER[name]))
    if config.tie_embeddings:
        moves.append(Move(OUTPUT, moves[0].shape, moves[0].release, GGUF))
    return moves


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a GGUF tensor gets the file's type; vectors, convolutions and routers are always float32."""
    return len(shape) > 1 and not any(part in name for part in _ALWAYS_FLOAT32)


def _whole(key: KeyMap, name: str) -> Move:
    shape = (1, *key.shape) if "ssm_conv1d_" in name else key.release_shape
    return Move(name, shape, key.release[0], GGUF)


def _latent_up(block: str, key: KeyMap, mixer: MLAConfig) -> list[Move]:
    H, R, N, V = mixer.num_heads, mixer.kv_lora_rank, mixer.qk_nope_head_dim, mixer.v_head_dim
    release = key.release[0]
    keys = (f"{block}attn_k_b.weight", (H, R, N), release, GGUF)
    return [
        Move(*keys, swap=True, groups=H, rows=slice(0, N)),
        Move(f"{block}attn_v_b.weight", (H, V, R), release, GGUF, groups=H, rows=slice(N, N + V)),
    ]
