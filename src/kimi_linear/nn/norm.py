"""RMSNorm as a module: y = weight * x / sqrt(mean(x^2) + eps), statistics in float32."""

from typing import Literal

import torch
from torch import Generator, Tensor, nn

from kimi_linear.nn.init import DEFAULT_STD, SelfInitialised
from kimi_linear.ops.norm import gated_rms_norm, rms_norm


class RMSNorm(nn.Module, SelfInitialised):
    """Normalise the last axis. The result has the dtype of x.

    Args:
        size: Channels of the last axis.
        eps: Added to the mean square, inside the root.

    Example:
        >>> RMSNorm(4)(torch.ones(2, 4)).shape
        torch.Size([2, 4])
    """

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def reset_own(self, std: float = DEFAULT_STD, generator: Generator | None = None) -> None:
        """Fill the weight with ones."""
        nn.init.ones_(self.weight)

    def forward(
        self, x: Tensor, gate: Tensor | None = None, activation: Literal["sigmoid", "silu"] = "sigmoid"
    ) -> Tensor:
        """Return x normalised over its last axis, [..., size], times the activation of the gate if there is one."""
        if gate is None:
            return rms_norm(x, self.weight, eps=self.eps)
        return gated_rms_norm(x, gate, self.weight, eps=self.eps, activation=activation)

    def extra_repr(self) -> str:
        """Describe the norm in a printed module."""
        return f"{self.weight.numel()}, eps={self.eps}"
