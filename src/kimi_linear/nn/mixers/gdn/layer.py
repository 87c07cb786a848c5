"""Gated DeltaNet (arXiv:2412.06464). Equations in README.md beside this file."""

from typing import ClassVar

import torch
from torch import Generator, Tensor

from kimi_linear.nn.init import DEFAULT_STD, init_log_uniform, init_time_step_bias, init_weights
from kimi_linear.nn.mixers.base import linear
from kimi_linear.nn.mixers.delta.layer import DeltaMixer
from kimi_linear.nn.mixers.gdn.config import GDNConfig
from kimi_linear.nn.precision import at_least_float32
from kimi_linear.nn.state import DeltaState, GDNState
from kimi_linear.ops.delta_rule import gated_delta_rule, gated_delta_rule_decode
from kimi_linear.ops.gate import forget_gate
from kimi_linear.ops.norm import l2_norm


class GatedDeltaNet(DeltaMixer):
    """The gated delta rule with one decay a value head, between short convolutions and a gated norm.

    Args:
        config: Heads, dims, output gate.
        hidden_size: Model width, D.

    Example:
        >>> layer = GatedDeltaNet(GDNConfig(num_heads=2, head_dim=8), hidden_size=16)
        >>> layer(torch.zeros(1, 5, 16)).shape
        torch.Size([1, 5, 16])
    """

    STATE: ClassVar[type[DeltaState]] = GDNState
    config: GDNConfig

    def __init__(self, config: GDNConfig, hidden_size: int) -> None:
        super().__init__(config, hidden_size, config.value_heads)
        self.gate_activation = config.gate_activation
        self.a_proj = linear(hidden_size, config.value_heads)
        if config.full_rank_gate:
            self.g_proj = linear(hidden_size, config.value_channels)
        else:
            self.g_a_proj = linear(hidden_size, config.head_dim)
            self.g_b_proj = linear(config.head_dim, config.value_channels)
        init_weights(self)

    @torch.no_grad()
    def reset_own(self, std: float = DEFAULT_STD, generator: Generator | None = None) -> None:
        """Draw A_log = log U(0, 16), as its authors do, and dt_bias = softplus^-1(dt)."""
        init_log_uniform(self.A_log, 0.0, 16.0, generator)
        init_time_step_bias(self.dt_bias, generator)

    def core(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run the recurrence over many tokens; see `DeltaMixer.core`."""
        log_decay, beta = self._gates(x)
        return gated_delta_rule(
            l2_norm(q), l2_norm(k), v, log_decay, beta, initial_state=initial_state, cu_seqlens=cu_seqlens
        )

    def decode(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, state: DeltaState, slots: Tensor) -> Tensor:
        """Advance one token a row, in place; see `DeltaMixer.decode`."""
        q, k, v = self.convolve_token(q, k, v, state, slots)
        log_decay, beta = self._gates(x)
        o = gated_delta_rule_decode(l2_norm(q), l2_norm(k), v, log_decay, beta, state.recurrent, slots)
        return self.gated_norm(o, x)

    def output_gate(self, x: Tensor) -> Tensor:
        """Return the logits of the output gate, [..., HV V]."""
        return self.g_proj(x) if self.config.full_rank_gate else self.g_b_proj(self.g_a_proj(x))

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log decay and the write strength, both [..., HV] in float32."""
        # One decay a head is K = 1 to the operator.
        log_decay = forget_gate(self.a_proj(x).unsqueeze(-1), self.A_log, self.dt_bias).squeeze(-1)
        return log_decay, at_least_float32(self.b_proj(x)).sigmoid()
