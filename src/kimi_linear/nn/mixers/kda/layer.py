"""Kimi Delta Attention (arXiv:2510.26692). Equations and traps in README.md beside this file."""

from typing import ClassVar

import torch
from torch import Generator, Tensor

from kimi_linear.nn.init import DEFAULT_STD, init_log_uniform, init_time_step_bias, init_weights
from kimi_linear.nn.mixers.base import linear
from kimi_linear.nn.mixers.delta.layer import DeltaMixer
from kimi_linear.nn.mixers.kda.config import KDAConfig
from kimi_linear.nn.norm import RMSNorm
from kimi_linear.nn.short_conv import ShortConvolution
from kimi_linear.nn.state import DeltaState, KDAState
from kimi_linear.ops.delta_rule import KDAPools, KDAWeights, kda_core, kda_core_decode, kda_layer_decode


class KimiDeltaAttention(DeltaMixer):
    """The gated delta rule with one decay a key channel, between short convolutions and a gated norm.

    Args:
        config: Heads, dims, gate.
        hidden_size: Model width, D.

    Example:
        >>> layer = KimiDeltaAttention(KDAConfig(num_heads=2, head_dim=8), hidden_size=16)
        >>> layer(torch.zeros(1, 5, 16)).shape
        torch.Size([1, 5, 16])
    """

    STATE: ClassVar[type[DeltaState]] = KDAState
    config: KDAConfig

    def __init__(self, config: KDAConfig, hidden_size: int) -> None:
        decays, rank = config.value_heads * config.head_dim, config.head_dim
        super().__init__(config, hidden_size, decays)
        self.f_a_proj = linear(hidden_size, rank)
        self.f_b_proj = linear(rank, decays)
        self.g_a_proj = linear(hidden_size, rank)
        self.g_b_proj = linear(rank, config.value_channels)
        init_weights(self)

    @torch.no_grad()
    def reset_own(self, std: float = DEFAULT_STD, generator: Generator | None = None) -> None:
        """Draw A_log = log U(1, 16) (zero for the bounded gate) and dt_bias = softplus^-1(dt)."""
        if self.config.gate_lower_bound is None:
            init_log_uniform(self.A_log, 1.0, 16.0, generator)
        else:
            self.A_log.zero_()
        init_time_step_bias(self.dt_bias, generator)

    def core(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run the recurrence over many tokens; see `DeltaMixer.core`."""
        return kda_core(
            q,
            k,
            v,
            self._gate(x),
            self.b_proj(x),
            self.A_log,
            self.dt_bias,
            lower_bound=self.config.gate_lower_bound,
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
        )

    def decode(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, state: DeltaState, slots: Tensor) -> Tensor:
        """Advance one token a row, in place; see `DeltaMixer.decode`."""
        if not self._reads_own_parameters():
            q, k, v = self.convolve_token(q, k, v, state, slots)
            inputs = (q, k, v, self._gate(x), self.b_proj(x), self.A_log, self.dt_bias, state.recurrent, slots)
            return self.gated_norm(kda_core_decode(*inputs, lower_bound=self.config.gate_lower_bound), x)
        taps = (self.q_conv1d.weight, self.k_conv1d.weight, self.v_conv1d.weight)
        return kda_layer_decode(
            q,
            k,
            v,
            self._gate(x),
            self.b_proj(x),
            self.output_gate(x).view_as(v),
            KDAWeights(*taps, self.A_log, self.dt_bias, self.o_norm.weight),
            KDAPools(state.conv_q, state.conv_k, state.conv_v, state.recurrent),
            slots,
            eps=self.o_norm.eps,
            activation=self.gate_activation,
            lower_bound=self.config.gate_lower_bound,
        )

    def _reads_own_parameters(self) -> bool:
        """Return whether the one operator may stand for the layer's parts: no adapter wraps them, no hook watches."""
        convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        if type(self.o_norm) is not RMSNorm or any(type(part) is not ShortConvolution for part in convolutions):
            return False
        return not (self.o_norm._forward_hooks or self.o_norm._forward_pre_hooks)

    def output_gate(self, x: Tensor) -> Tensor:
        """Return the logits of the output gate, [..., HV V]."""
        return self.g_b_proj(self.g_a_proj(x))

    def _gate(self, x: Tensor) -> Tensor:
        """Return the logits of the forget gate, [..., HV, K]."""
        return self.f_b_proj(self.f_a_proj(x)).unflatten(-1, (self.config.value_heads, self.config.head_dim))
