"""The frame of a delta-rule mixer: project, convolve, run a core, norm and gate each head, project back."""

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kimi_linear.nn.init import SelfInitialised
from kimi_linear.nn.mixers.base import Mixer, check_input, is_decode, linear, num_sequences
from kimi_linear.nn.mixers.delta.config import DeltaConfig
from kimi_linear.nn.norm import RMSNorm
from kimi_linear.nn.short_conv import ShortConvolution
from kimi_linear.nn.state import DeltaState, check_state


class DeltaMixer(Mixer, SelfInitialised):
    """Everything of a delta-rule mixer but its core and its gates.

    A subclass adds the matrices of its gates, calls `init_weights(self)` at the end of its constructor, and fills the
    three methods below. The gates read x, the mixer's input, not what the convolutions return.
    """

    FLOAT32: ClassVar[frozenset[str]] = DeltaConfig.float32
    STATE: ClassVar[type[DeltaState]]
    config: DeltaConfig
    # Of the output gate.
    gate_activation: Literal["sigmoid", "silu"] = "sigmoid"

    def __init__(self, config: DeltaConfig, hidden_size: int, num_decays: int) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        key, value = config.key_channels, config.value_channels
        self.q_proj = linear(hidden_size, key)
        self.k_proj = linear(hidden_size, key)
        self.v_proj = linear(hidden_size, value)
        self.q_conv1d = ShortConvolution(key, config.conv_size)
        self.k_conv1d = ShortConvolution(key, config.conv_size)
        self.v_conv1d = ShortConvolution(value, config.conv_size)
        self.A_log = nn.Parameter(torch.empty(config.value_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(num_decays, dtype=torch.float32))
        self.b_proj = linear(hidden_size, config.value_heads)
        self.o_norm = RMSNorm(config.value_dim, config.norm_eps)
        self.o_proj = linear(value, hidden_size)

    @abstractmethod
    def core(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the output [B, T, HV, V] and the final state [N, HV, K, V].

        q and k are [B, T, H, K], convolved but not normalised; v is [B, T, HV, V]; x is [B, T, D].
        """

    @abstractmethod
    def decode(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, state: DeltaState, slots: Tensor) -> Tensor:
        """Return the heads [N, HV, V] of one token a row, normed and gated; the state is updated in place.

        q and k are [N, H, K] and v is [N, HV, V], not yet convolved; x is [N, D].
        """

    @abstractmethod
    def output_gate(self, x: Tensor) -> Tensor:
        """Return the logits of the output gate, [..., HV V]."""

    def new_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> DeltaState:
        """Return the all-zero state before the first token."""
        c = self.config
        shape = (batch_size, c.value_heads, c.head_dim, c.value_dim)
        recurrent_dtype = torch.float64 if dtype == torch.float64 else torch.float32

        def tail(channels: int) -> Tensor:
            return torch.zeros(batch_size, channels, c.conv_size - 1, device=device, dtype=dtype)

        return self.STATE(
            conv_q=tail(c.key_channels),
            conv_k=tail(c.key_channels),
            conv_v=tail(c.value_channels),
            recurrent=torch.zeros(shape, device=device, dtype=recurrent_dtype),
        )

    def forward(self, x: Tensor, state: DeltaState | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mix x [B, T, D]; see `Mixer.forward`."""
        check_input(x, self.hidden_size, cu_seqlens)
        if state is not None:
            check_state(state, self.STATE, num_sequences(x, cu_seqlens))
            if is_decode(x, state, cu_seqlens):
                return self._decode(x.squeeze(1), state).unsqueeze(1)
        tails = (None, None, None) if state is None else (state.conv_q, state.conv_k, state.conv_v)
        q, tail_q = self.q_conv1d(self.q_proj(x), tails[0], cu_seqlens)
        k, tail_k = self.k_conv1d(self.k_proj(x), tails[1], cu_seqlens)
        v, tail_v = self.v_conv1d(self.v_proj(x), tails[2], cu_seqlens)
        o, recurrent = self.core(*self._heads(q, k, v), x, None if state is None else state.recurrent, cu_seqlens)
        if state is not None:
            state.conv_q, state.conv_k, state.conv_v = tail_q.detach(), tail_k.detach(), tail_v.detach()
            state.recurrent = recurrent.detach()
        return self.o_proj(self.gated_norm(o, x).flatten(-2))

    def gated_norm(self, o: Tensor, x: Tensor) -> Tensor:
        """Norm every head of o [..., HV, V] and gate it."""
        return self.o_norm(o, self.output_gate(x).unflatten(-1, o.shape[-2:]), self.gate_activation)

    def convolve_token(
        self, q: Tensor, k: Tensor, v: Tensor, state: DeltaState, slots: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Convolve one token a row and move the histories on, in place."""
        return (
            self.q_conv1d.decode(q.flatten(1), state.conv_q, slots).view_as(q),
            self.k_conv1d.decode(k.flatten(1), state.conv_k, slots).view_as(k),
            self.v_conv1d.decode(v.flatten(1), state.conv_v, slots).view_as(v),
        )

    def _decode(self, x: Tensor, state: DeltaState) -> Tensor:
        """Return the output [N, D] of one token a row, x [N, D]; the state is updated in place."""
        slots = torch.arange(x.shape[0], device=x.device)
        heads = self._heads(self.q_proj(x), self.k_proj(x), self.v_proj(x))
        return self.o_proj(self.decode(*heads, x, state, slots).flatten(-2))

    def _heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        key, value = (c.num_heads, c.head_dim), (c.value_heads, c.value_dim)
        return q.unflatten(-1, key), k.unflatten(-1, key), v.unflatten(-1, value)
