"""Bits per byte: how many bits a model needs for each byte of a text, whatever its tokenizer."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from kimi_linear.base.errors import DataError

IGNORE_INDEX = -100


@torch.no_grad()
def bits_per_byte(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor, Tensor, int]]) -> float:
    """Return the bits a model needs per byte of text.

        bits per byte = sum over targets of -ln p(target | what comes before it in its sequence) / ln 2 / bytes

    A token is a target if its label is not -100 and it is not the first of its sequence. `bytes` is the UTF-8 length
    of the text that the targets spell, as counted by whoever cut the text: special tokens spell nothing, so predicting
    one costs bits and earns no bytes. The figure compares with that of a compressor on the same bytes if every byte of
    the text belongs to exactly one target. The model must be in eval mode and under the precision to be measured.

    Args:
        model: `model(input_ids, labels=..., cu_seqlens=...).loss` is the mean over the targets, in nats.
        batches: Of each batch: input_ids [1, T]; cu_seqlens [N + 1], offsets of its sequences; labels [1, T], aligned
            with input_ids (the model shifts them); bytes that its targets spell.

    Returns:
        Bits per byte; 8 is what storing the text as it is takes.

    Raises:
        DataError: The batches hold no byte of text.

    Numerics: sums in float64 what the model returns in float32 a batch.
    Cost: one forward pass over the tokens.

    Example:
        >>> from kimi_linear.models.kimi_linear.model import KimiLinearLM
        >>> from kimi_linear.models.kimi_linear.presets import preset
        >>> model, ids = KimiLinearLM(preset("tiny")).eval(), torch.arange(16)[None]
        >>> batch = (ids, torch.tensor([0, 16], dtype=torch.int32), ids, 15)
        >>> round(bits_per_byte(model, [batch]))
        8
    """
    nats, num_bytes = 0.0, 0
    device = next(model.parameters()).device
    for input_ids, cu_seqlens, labels, batch_bytes in batches:
        targets = _count_targets(labels, cu_seqlens)
        if targets:
            loss = model(input_ids.to(device), labels=labels.to(device), cu_seqlens=cu_seqlens.to(device)).loss
            nats += loss.item() * targets
        num_bytes += batch_bytes
    if num_bytes == 0:
        raise DataError("the held-out batches spell no byte of text; give a text that is not empty.")
    return nats / math.log(2.0) / num_bytes


def _count_targets(labels: Tensor, cu_seqlens: Tensor) -> int:
    is_target = labels[0] != IGNORE_INDEX
    # An empty sequence at the end begins where the row ends.
    starts = cu_seqlens[:-1].long()
    is_target[starts[starts < labels.shape[1]]] = False
    return int(is_target.sum())
