"""SwiGLU (arXiv:2002.05202): down(silu(gate(x)) * up(x))."""

from torch import Tensor

from kimi_linear.nn.ffn.base import FFN
from kimi_linear.nn.ffn.config import SwiGLUConfig
from kimi_linear.nn.init import init_weights
from kimi_linear.nn.linear import Linear
from kimi_linear.ops.swiglu import swiglu


class SwiGLU(FFN):
    """The dense feed-forward network, without biases.

    Example:
        >>> import torch
        >>> SwiGLU(SwiGLUConfig(intermediate_size=32), hidden_size=16)(torch.zeros(2, 16)).shape
        torch.Size([2, 16])
    """

    def __init__(self, config: SwiGLUConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.gate_proj = Linear(hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, hidden_size, bias=False)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of x, [..., D]."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
