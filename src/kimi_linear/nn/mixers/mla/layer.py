"""Multi-head latent attention as Kimi Linear uses it. Equations and traps in README.md beside this file."""

import torch
from torch import Tensor

from kimi_linear.nn.init import init_weights
from kimi_linear.nn.linear import weight_of
from kimi_linear.nn.mixers.base import Mixer, check_input, is_decode, linear, num_sequences, positions
from kimi_linear.nn.mixers.mla.config import MLAConfig
from kimi_linear.nn.norm import RMSNorm
from kimi_linear.nn.state import MLAState, check_state
from kimi_linear.ops.attention import mla_attention, mla_decode
from kimi_linear.ops.rope import apply_rope


class MultiHeadLatentAttention(Mixer):
    """Softmax attention whose keys and values are rebuilt from one small latent a token.

    Many tokens at once take the expanded form (keys and values are built); one token takes the absorbed form, which
    works on the remembered latents directly. Both give the same result up to rounding.

    Args:
        config: Heads, ranks, dims.
        hidden_size: Model width, D.

    Example:
        >>> config = MLAConfig(num_heads=2, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
        >>> MultiHeadLatentAttention(config, hidden_size=16)(torch.zeros(1, 5, 16)).shape
        torch.Size([1, 5, 16])
    """

    def __init__(self, config: MLAConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        H, R = config.num_heads, config.kv_lora_rank
        self.q_proj = linear(hidden_size, H * config.qk_head_dim)
        self.kv_a_proj_with_mqa = linear(hidden_size, R + config.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(R, config.latent_norm_eps)
        self.kv_b_proj = linear(R, H * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = linear(H * config.v_head_dim, hidden_size)
        init_weights(self)

    def new_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> MLAState:
        """Return the empty state before the first token."""
        return MLAState(
            lengths=torch.zeros(batch_size, dtype=torch.int64, device="cpu"),
            latent=torch.zeros(batch_size, 0, self.config.kv_lora_rank, device=device, dtype=dtype),
            key_rope=torch.zeros(batch_size, 0, self.config.qk_rope_head_dim, device=device, dtype=dtype),
        )

    def forward(self, x: Tensor, state: MLAState | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mix x [B, T, D]; see `Mixer.forward`."""
        check_input(x, self.hidden_size, cu_seqlens)
        if state is not None:
            check_state(state, MLAState, num_sequences(x, cu_seqlens))
        q, latent, key_rope = self._project(x, None if state is None else state.lengths, cu_seqlens)
        if state is not None and is_decode(x, state, cu_seqlens):
            state.append((latent.squeeze(1), key_rope.squeeze(1)))
            return self.o_proj(self._decode(q.squeeze(1), state).flatten(-2)).unsqueeze(1)
        cu_seqlens_k = cu_seqlens
        if state is not None:
            history = state.extend((latent, key_rope), cu_seqlens)
            (latent, key_rope), cu_seqlens_k = history.tensors, history.cu_seqlens_k
            if history.cu_seqlens is not None:
                # Rows of different lengths run as one packed row.
                q, cu_seqlens = q.flatten(0, 1).unsqueeze(0), history.cu_seqlens
        o = mla_attention(
            q,
            latent.to(q.dtype),
            key_rope.to(q.dtype),
            weight_of(self.kv_b_proj, self.config.kv_lora_rank, q),
            nope_dim=self.config.qk_nope_head_dim,
            cu_seqlens=cu_seqlens,
            cu_seqlens_k=cu_seqlens_k,
        )
        return self.o_proj(o.reshape(*x.shape[:2], -1))

    def _project(self, x: Tensor, past: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return q [B, T, H, dn + dr], the normed latent [B, T, R] and the shared key slice [B, T, dr]."""
        c = self.config
        q = self.q_proj(x).unflatten(-1, (c.num_heads, c.qk_head_dim))
        latent, key_rope = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        latent = self.kv_a_layernorm(latent)
        if c.rope_theta is not None:
            where = positions(x, past, cu_seqlens)
            q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
            q = torch.cat([q_nope, apply_rope(q_rope, where, theta=c.rope_theta)], dim=-1)
            key_rope = apply_rope(key_rope.unsqueeze(2), where, theta=c.rope_theta).squeeze(2)
        return q, latent, key_rope

    def _decode(self, q: Tensor, state: MLAState) -> Tensor:
        """Attend from one token a row, q [N, H, dn + dr], over the state; absorbed form. Returns [N, H, dv]."""
        used = int(state.lengths.max())
        return mla_decode(
            q,
            state.latent[:, :used],
            state.key_rope[:, :used],
            state.lengths.to(q.device),
            weight_of(self.kv_b_proj, self.config.kv_lora_rank, q),
            nope_dim=self.config.qk_nope_head_dim,
        )
