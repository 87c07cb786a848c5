"""The causal depthwise convolution with SiLU in front of a recurrence, as a module."""

import math

import torch
from torch import Generator, Tensor, nn

from kimi_linear.nn.init import DEFAULT_STD, SelfInitialised
from kimi_linear.ops.conv import short_conv, short_conv_decode


class ShortConvolution(nn.Module, SelfInitialised):
    """y_t[c] = silu(sum_j weight[c, 0, j] x_{t-W+1+j}[c]); the last tap meets the current token; no bias.

    Args:
        channels: D, one filter each.
        size: Taps, W.

    Example:
        >>> y, tail = ShortConvolution(8, 4)(torch.zeros(1, 5, 8))
        >>> y.shape, tail.shape
        (torch.Size([1, 5, 8]), torch.Size([1, 8, 3]))
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, size))
        self.reset_own()

    @torch.no_grad()
    def reset_own(self, std: float = DEFAULT_STD, generator: Generator | None = None) -> None:
        """Draw uniformly in +-1/sqrt(W), the default of torch's Conv1d and of the released reference code.

        With normal(0, 0.02) the values written to the state would start so small that the output norm's epsilon
        outweighs them.
        """
        bound = 1 / math.sqrt(self.weight.shape[-1])
        self.weight.uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor, tail: Tensor | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return y [B, T, D] and the new tail [N, D, W - 1]: the last inputs of each sequence, oldest first."""
        return short_conv(x, self.weight, initial_state=tail, cu_seqlens=cu_seqlens, activation="silu")

    def decode(self, x: Tensor, tail: Tensor, slots: Tensor) -> Tensor:
        """Return y [N, D] of one token a sequence; the tail [S, D, W - 1] is shifted in place at the slots [N]."""
        return short_conv_decode(x, self.weight, tail, slots, activation="silu")
