"""Log-likelihoods of continuations: each context is read once, and its continuations go on from copies of the cache.

Sequences run packed, so the result of one does not depend on the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kimi_linear.models.kimi_linear.model import KimiLinearLM

# Tokens whose logits exist at the same time.
_LOGITS = 1024


@dataclass(frozen=True)
class Scored:
    """The log-probability of a continuation, and whether each of its tokens is the most likely one."""

    log_probability: float
    is_greedy: bool


@torch.no_grad()
def score(
    model: KimiLinearLM, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[Sequence[int]]]
) -> list[Scored]:
    """Return the score of every continuation of every context, in order.

    Args:
        model: In evaluation mode.
        contexts: Tokens, at least one each.
        continuations: Those of each context; an empty one scores 0.

    Example:
        >>> from kimi_linear.models.kimi_linear.presets import preset
        >>> model = KimiLinearLM(preset("tiny")).eval()
        >>> a, b = score(model, [[1, 2]], [[[3, 4], []]])
        >>> a.log_probability < 0, b.log_probability
        (True, 0.0)
    """
    cache = model.new_cache(len(contexts))
    prefixes = [list(context[:-1]) for context in contexts]
    if any(prefixes):
        ids, offsets = _pack(prefixes, model)
        model(ids, cache=cache, cu_seqlens=offsets, last_only=True)
    owners = [index for index, own in enumerate(continuations) for _ in own]
    targets = [list(continuation) for own in continuations for continuation in own]
    if not targets:
        return []
    inputs = [[contexts[owner][-1], *target[:-1]] for owner, target in zip(owners, targets, strict=True)]
    inputs = [row[: len(target)] for row, target in zip(inputs, targets, strict=True)]
    cache = cache.select_rows(torch.tensor(owners))
    sums, greedy = torch.zeros(len(targets), dtype=torch.float64), torch.ones(len(targets), dtype=torch.bool)
    step = max(1, _LOGITS // len(targets))
    for start in range(0, max(map(len, targets)), step):
        pieces = [row[start : start + step] for row in inputs]
        ids, offsets = _pack(pieces, model)
        logits = model(ids, cache=cache, cu_seqlens=offsets).logits[0]
        wanted = torch.tensor([token for target in targets for token in target[start : start + step]])
        _add(sums, greedy, logits, wanted, torch.tensor([i for i, piece in enumerate(pieces) for _ in piece]))
    return [Scored(total, best) for total, best in zip(sums.tolist(), greedy.tolist(), strict=True)]


def _add(sums: Tensor, greedy: Tensor, logits: Tensor, wanted: Tensor, rows: Tensor) -> None:
    """Add the log-probabilities of tokens [M] under logits [M, V] to their rows, in place."""
    wanted = wanted.to(logits.device)
    picked = logits.float().log_softmax(dim=-1).gather(1, wanted[:, None]).squeeze(1)
    sums.index_add_(0, rows, picked.double().cpu())
    missed = rows[(logits.argmax(dim=-1) != wanted).cpu()]
    greedy[missed] = False


def _pack(sequences: Sequence[Sequence[int]], model: KimiLinearLM) -> tuple[Tensor, Tensor]:
    """Return sequences end to end, [1, T], and their offsets."""
    device = model.model.embed_tokens.weight.device
    offsets = torch.tensor([0, *map(len, sequences)]).cumsum(0)
    ids = torch.tensor([[token for sequence in sequences for token in sequence]])
    return ids.to(device), offsets.to(device, torch.int32)
