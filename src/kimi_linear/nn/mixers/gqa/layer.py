"""Grouped-query softmax attention. Equations in README.md beside this file."""

import torch
from torch import Tensor

from kimi_linear.nn.init import init_weights
from kimi_linear.nn.mixers.base import Mixer, check_input, is_decode, linear, num_sequences, positions
from kimi_linear.nn.mixers.gqa.config import GQAConfig
from kimi_linear.nn.norm import RMSNorm
from kimi_linear.nn.state import GQAState, check_state
from kimi_linear.ops.attention import attention, attention_decode
from kimi_linear.ops.rope import apply_rope


class GroupedQueryAttention(Mixer):
    """Causal softmax attention in which several query heads share one key/value head.

    Args:
        config: Heads, dim, window, positions.
        hidden_size: Model width, D.

    Example:
        >>> config = GQAConfig(num_heads=4, num_kv_heads=2, head_dim=8)
        >>> GroupedQueryAttention(config, hidden_size=16)(torch.zeros(1, 5, 16)).shape
        torch.Size([1, 5, 16])
    """

    def __init__(self, config: GQAConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        self.q_proj = linear(hidden_size, config.num_heads * config.head_dim)
        self.k_proj = linear(hidden_size, config.num_kv_heads * config.head_dim)
        self.v_proj = linear(hidden_size, config.num_kv_heads * config.head_dim)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.o_proj = linear(config.num_heads * config.head_dim, hidden_size)
        init_weights(self)

    def new_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> GQAState:
        """Return the empty state before the first token."""
        shape = (batch_size, 0, self.config.num_kv_heads, self.config.head_dim)
        return GQAState(
            lengths=torch.zeros(batch_size, dtype=torch.int64, device="cpu"),
            window=self.config.window,
            keys=torch.zeros(shape, device=device, dtype=dtype),
            values=torch.zeros(shape, device=device, dtype=dtype),
        )

    def forward(self, x: Tensor, state: GQAState | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mix x [B, T, D]; see `Mixer.forward`."""
        check_input(x, self.hidden_size, cu_seqlens)
        if state is not None:
            check_state(state, GQAState, num_sequences(x, cu_seqlens))
        q, k, v = self._project(x, None if state is None else state.lengths, cu_seqlens)
        if state is not None and is_decode(x, state, cu_seqlens):
            state.append((k.squeeze(1), v.squeeze(1)))
            return self.o_proj(self._decode(q.squeeze(1), state).flatten(-2)).unsqueeze(1)
        cu_seqlens_k = cu_seqlens
        if state is not None:
            history = state.extend((k, v), cu_seqlens)
            (k, v), cu_seqlens_k = history.tensors, history.cu_seqlens_k
            if history.cu_seqlens is not None:
                # Rows of different lengths run as one packed row.
                q, cu_seqlens = q.flatten(0, 1).unsqueeze(0), history.cu_seqlens
        o = attention(
            q,
            k.to(q.dtype),
            v.to(q.dtype),
            window=self.config.window,
            cu_seqlens=cu_seqlens,
            cu_seqlens_k=cu_seqlens_k,
        )
        return self.o_proj(o.reshape(*x.shape[:2], -1))

    def _project(self, x: Tensor, past: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return q [B, T, Hq, K] and k, v [B, T, Hkv, K], normed and rotated if the config says so."""
        c = self.config
        q = self.q_proj(x).unflatten(-1, (c.num_heads, c.head_dim))
        k = self.k_proj(x).unflatten(-1, (c.num_kv_heads, c.head_dim))
        v = self.v_proj(x).unflatten(-1, (c.num_kv_heads, c.head_dim))
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if c.rope_theta is not None:
            where = positions(x, past, cu_seqlens)
            q, k = apply_rope(q, where, theta=c.rope_theta), apply_rope(k, where, theta=c.rope_theta)
        return q, k, v

    def _decode(self, q: Tensor, state: GQAState) -> Tensor:
        """Attend from one token a row, q [N, Hq, K], over the state. Returns [N, Hq, K].

        A ring holds just the window, in any order: softmax does not care, and keys are rotated before they are kept.
        """
        used = state.used
        most = int(used.max())
        keys, values = state.keys[:, :most], state.values[:, :most]
        return attention_decode(q, keys, values, used.to(q.device))
