"""Where history and tokens lie when every sequence is preceded by its own history: the one layout of the convolution.

A segment is a sequence's history, W - 1 rows, followed by its tokens; segments follow each other. In that layout

- a token's inputs are the W rows that end at its own, whatever the sequence boundaries;
- the final state is the last W - 1 rows of the segment, however short the sequence is, empty ones included;
- the gradient of the state is the gradient of the history rows.

So packed sequences, batches, short sequences and empty ones need no cases of their own. R is the number of rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kimi_linear.ops.checks import check_cu_seqlens_values


@dataclass(frozen=True)
class Layout:
    """Rows of the segments, all int64 and ascending."""

    width: int
    # R = tokens + N * (W - 1)
    rows: int
    # [B * T], the row of each token.
    tokens: Tensor
    # [N * (W - 1)], the rows of the histories, and of the final states.
    history: Tensor
    final: Tensor


def segments(batch: int, tokens: int, cu_seqlens: Tensor | None, width: int, device: torch.device) -> Layout:
    """Return the layout of `batch` sequences of `tokens` tokens, or of the packed ones between `cu_seqlens`."""
    if cu_seqlens is None:
        offsets = torch.arange(batch + 1, device=device) * tokens
    else:
        check_cu_seqlens_values(cu_seqlens, tokens)
        offsets = cu_seqlens.long()
    sequences = offsets.shape[0] - 1
    past = width - 1
    total = batch * tokens
    sequence = torch.arange(sequences, device=device)
    steps = torch.arange(past, device=device)
    owner = torch.repeat_interleave(sequence, offsets.diff(), output_size=total)
    return Layout(
        width=width,
        rows=total + sequences * past,
        tokens=torch.arange(total, device=device) + (owner + 1) * past,
        history=((offsets[:-1] + sequence * past)[:, None] + steps).flatten(),
        final=((offsets[1:] + sequence * past)[:, None] + steps).flatten(),
    )


def state_to_rows(state: Tensor) -> Tensor:
    """Turn states [N, D, W - 1] into rows [N * (W - 1), D], oldest first."""
    return state.transpose(1, 2).reshape(-1, state.shape[1])


def rows_to_state(rows: Tensor, sequences: int, layout: Layout) -> Tensor:
    """Turn rows [N * (W - 1), D] into states [N, D, W - 1], contiguous."""
    return rows.view(sequences, layout.width - 1, rows.shape[1]).transpose(1, 2).contiguous()
