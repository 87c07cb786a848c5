"""The network as a for-loop over blocks, from token ids to normed hidden states."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kimi_linear.nn.block import Block
from kimi_linear.nn.config import BlockConfig
from kimi_linear.nn.norm import RMSNorm
from kimi_linear.nn.residual import build_residual
from kimi_linear.nn.state import LayerState


class Decoder(nn.Module):
    """Embedding, blocks, final norm; no output head.

    Args:
        blocks: One configuration a layer.
        vocab_size: Rows of the embedding.
        hidden_size: Model width, D.
        norm_eps: Epsilon of all block norms and the final norm.
        residual: Kind of residual scheme.
        pad_token_id: Row of the embedding that is zero and gets no gradient, if any.
    """

    def __init__(
        self,
        blocks: Sequence[BlockConfig],
        *,
        vocab_size: int,
        hidden_size: int,
        norm_eps: float,
        residual: str = "standard",
        pad_token_id: int | None = None,
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size, padding_idx=pad_token_id)
        self.layers = nn.ModuleList(Block(block, hidden_size, norm_eps) for block in blocks)
        self.norm = RMSNorm(hidden_size, norm_eps)
        self.residual = build_residual(residual)

    def blocks(self) -> list[Block]:
        """Return the blocks, from the input up."""
        return [cast(Block, block) for block in self.layers]

    def new_states(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> tuple[LayerState, ...]:
        """Return every layer's state before the first token."""
        return tuple(block.self_attn.new_state(batch_size, device=device, dtype=dtype) for block in self.blocks())

    def forward(
        self, input_ids: Tensor, states: Sequence[LayerState] | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Return the normed hidden states [B, T, D] of token ids [B, T]; states are updated in place."""
        stream = self.residual.start(self.embed_tokens(input_ids))
        for index, block in enumerate(self.blocks()):
            state = None if states is None else states[index]
            stream = block(stream, self.residual, index, state, cu_seqlens)
        return self.norm(self.residual.finish(stream))


def checkpoint_blocks(decoder: Decoder) -> None:
    """Recompute each block in the backward pass instead of keeping its activations, from now on.

    Changes the decoder's blocks, not their parameters or names. Calls with a state, or without gradients, run as
    before. Routers count the tokens of recomputed blocks twice, all experts alike, which leaves the direction of the
    bias update as it is.

    Example:
        >>> from kimi_linear.models.kimi_linear.model import KimiLinearLM
        >>> from kimi_linear.models.kimi_linear.presets import preset
        >>> checkpoint_blocks(KimiLinearLM(preset("tiny")).model)
    """
    for block in decoder.blocks():
        # On the instance, so that names and parameters stay.
        block.forward = _recomputed(block.forward)  # type: ignore[method-assign]


def _recomputed(forward: Any) -> Any:
    def wrapped(
        stream: Any, residual: nn.Module, layer_idx: int, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> Any:
        if state is not None:
            # A state is updated in place; running the block again would update it twice.
            return forward(stream, residual, layer_idx, state, cu_seqlens)
        return checkpoint(forward, stream, residual, layer_idx, None, cu_seqlens, use_reentrant=False)

    return wrapped
