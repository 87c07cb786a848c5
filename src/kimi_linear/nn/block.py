"""One layer: a mixer and a feed-forward network, each behind its norm, on a residual stream."""

from typing import Any

from torch import Tensor, nn

from kimi_linear.nn.config import BlockConfig
from kimi_linear.nn.ffn import FFNS
from kimi_linear.nn.ffn.base import FFN
from kimi_linear.nn.mixers import MIXERS
from kimi_linear.nn.mixers.base import Mixer
from kimi_linear.nn.norm import RMSNorm
from kimi_linear.nn.residual.base import ResidualScheme
from kimi_linear.nn.state import LayerState


class Block(nn.Module):
    """A layer of the network; its parts are named as in the released checkpoint.

    Args:
        config: Mixer and feed-forward network.
        hidden_size: Model width, D.
        norm_eps: Epsilon of the two norms.
    """

    def __init__(self, config: BlockConfig, hidden_size: int, norm_eps: float) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(hidden_size, norm_eps)
        self.self_attn: Mixer = MIXERS.build(config.mixer, hidden_size)
        self.post_attention_layernorm = RMSNorm(hidden_size, norm_eps)
        self.mlp: FFN = FFNS.build(config.ffn, hidden_size)

    def forward(
        self,
        stream: Any,
        residual: ResidualScheme,
        layer_idx: int,
        state: LayerState | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Any:
        """Return the stream after this layer; a state is continued from and updated in place."""
        x = self.input_layernorm(residual.read(stream, 2 * layer_idx))
        stream = residual.write(stream, self.self_attn(x, state, cu_seqlens), 2 * layer_idx)
        x = self.post_attention_layernorm(residual.read(stream, 2 * layer_idx + 1))
        return residual.write(stream, self.mlp(x), 2 * layer_idx + 1)
