"""Prompts in any of the usual forms, as one plain list of tokens a row; and back to a batch the model takes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kimi_linear.base.errors import KimiLinearError, ShapeError

# One row or several, as a tensor or as lists.
PromptIds = Tensor | Sequence[int] | Sequence[Sequence[int]]


def read_prompts(input_ids: PromptIds, attention_mask: Tensor | None, vocab_size: int) -> list[list[int]]:
    """Return the tokens of each row, without padding.

    Args:
        input_ids: [B, T] or [T] integers, or a list of tokens, or a list of such lists, which may differ in length.
        attention_mask: For a tensor of prompts padded on either side: same shape, 1 at tokens and 0 at padding.
        vocab_size: Tokens must lie below it.

    Raises:
        ShapeError: No row, a row without a token, another shape, or a mask that does not fit.
        KimiLinearError: A token outside the vocabulary.

    Example:
        >>> read_prompts(torch.tensor([[0, 5, 6], [7, 8, 9]]), torch.tensor([[0, 1, 1], [1, 1, 1]]), 10)
        [[5, 6], [7, 8, 9]]
    """
    if isinstance(input_ids, Tensor):
        rows = _tensor_rows(input_ids, attention_mask)
    elif attention_mask is not None:
        raise ShapeError("generate: attention_mask belongs to a tensor of padded prompts; leave it out with lists.")
    else:
        rows = _list_rows(input_ids)
    if not rows:
        raise ShapeError("generate: input_ids has no rows, expected at least one prompt.")
    for index, row in enumerate(rows):
        if not row:
            raise ShapeError(f"generate: prompt {index} is empty, expected at least one token (a bos token will do).")
        if min(row) < 0 or max(row) >= vocab_size:
            wrong = next(token for token in row if not 0 <= token < vocab_size)
            raise KimiLinearError(
                f"generate: prompt {index} holds token {wrong}, expected tokens from 0 to {vocab_size - 1}; is the "
                "tokenizer that of another model?"
            )
    return rows


def pad_left(rows: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Return the rows as one tensor [B, T] whose last column holds every row's last token, and its mask [B, T]."""
    T = max(len(row) for row in rows)
    ids = torch.tensor([[fill] * (T - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _tensor_rows(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool or input_ids.dim() not in (1, 2):
        raise ShapeError(
            f"generate: input_ids is {list(input_ids.shape)} {input_ids.dtype}, expected integers [B, T] or [T]."
        )
    ids = input_ids.reshape(-1, input_ids.shape[-1])
    if attention_mask is None:
        return ids.tolist()
    if attention_mask.shape != input_ids.shape:
        raise ShapeError(
            f"generate: attention_mask is {list(attention_mask.shape)}, expected the shape of input_ids, "
            f"{list(input_ids.shape)}."
        )
    if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise ShapeError("generate: attention_mask holds values other than 0 and 1; give 1 at tokens, 0 at padding.")
    kept = attention_mask.reshape(ids.shape).to(ids.device) == 1
    return [row[keep].tolist() for row, keep in zip(ids, kept, strict=True)]


def _list_rows(input_ids: Sequence[int] | Sequence[Sequence[int]]) -> list[list[int]]:
    rows = [input_ids] if input_ids and isinstance(input_ids[0], int) else input_ids
    # A string is a sequence too; bool is an int.
    for row in rows:
        if not isinstance(row, (list, tuple)) or not all(type(token) is int for token in row):
            raise ShapeError(f"generate: a prompt is {row!r:.80}, expected a list of token ids; encode the text first.")
    return [list(row) for row in rows if isinstance(row, (list, tuple))]
