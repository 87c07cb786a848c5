"""What packing a model's weights costs in quality: the model against its quantised self on the same text."""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kimi_linear.base.errors import DataError
from kimi_linear.evaluation.bits_per_byte import IGNORE_INDEX
from kimi_linear.nn.ffn.moe import Experts
from kimi_linear.ops.linear.packed import PackedLinear, WeightFormat


@dataclass(frozen=True)
class QuantisationLoss:
    """How far a quantised model is from itself; means over the targets.

    Args:
        targets: Tokens that were predicted.
        kl: Kullback-Leibler divergence of the quantised prediction from the original one, in nats.
        perplexity: Of the original model.
        quantised_perplexity: Of the quantised one.
        agreement: Share of targets for which both name the same most likely token.
    """

    targets: int
    kl: float
    perplexity: float
    quantised_perplexity: float
    agreement: float


def quantised_copy(model: nn.Module, format: WeightFormat) -> nn.Module:
    """Return a copy of the model that computes with packed weights, rows rounded as the packed products round them.

    Every linear layer runs as a `PackedLinear`. The experts of a mixture, and matrices that an operator reads itself,
    get the values that the packed weights stand for. Embeddings, norms, convolutions and the router stay.

    Raises:
        BackendError, ConfigError: As `PackedLinear`.
    """
    result = copy.deepcopy(model)
    embeddings = {id(part.weight) for part in result.modules() if isinstance(part, nn.Embedding)}
    for part in result.modules():
        if isinstance(part, nn.Linear):
            packed = PackedLinear(part.weight, part.bias, format=format)
            # A tied head shares its matrix with the embedding, which stays.
            if id(part.weight) not in embeddings:
                part.weight.data.copy_(packed.weight())
            part.forward = packed.__call__  # type: ignore[method-assign,assignment]
        elif isinstance(part, Experts):
            for weight in (part.w1, part.w2, part.w3):
                for matrix in weight.data:
                    matrix.copy_(PackedLinear(matrix, format=format).weight())
    return result


@torch.no_grad()
def quantisation_loss(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor, Tensor, int]], format: WeightFormat
) -> QuantisationLoss:
    """Compare the predictions of a model and of its quantised copy.

        kl = mean over targets of sum_v p_v (ln p_v - ln q_v),  p the original prediction, q the quantised one
        perplexity = exp(mean over targets of -ln p(target))

    A token is a target if its label is not -100 and it is not the first of its sequence. The model must be in eval mode
    and on the CPU.

    Args:
        model: `model(input_ids, cu_seqlens=...).logits` is [1, T, V].
        batches: As for `bits_per_byte`.
        format: "float32", "bfloat16", "int8" or "int4".

    Raises:
        DataError: The batches hold no target.
        BackendError, ConfigError: As `PackedLinear`.

    Numerics: logarithms of probabilities in float32, sums in float64.
    Cost: two forward passes over the tokens, a copy of the model, and three times the logits of a batch.
    """
    quantised = quantised_copy(model, format)
    sums = torch.zeros(4, dtype=torch.float64)
    count = 0
    for input_ids, cu_seqlens, labels, _ in batches:
        at, targets = _targets(labels, cu_seqlens)
        p, q = (
            part(input_ids, cu_seqlens=cu_seqlens).logits[0, at].float().log_softmax(-1) for part in (model, quantised)
        )
        kl = (p.exp() * (p - q)).sum(-1)
        nll, quantised_nll = (-x.gather(1, targets[:, None]).squeeze(1) for x in (p, q))
        same = p.argmax(-1) == q.argmax(-1)
        sums += torch.stack([x.double().sum() for x in (kl, nll, quantised_nll, same)])
        count += len(targets)
    if count == 0:
        raise DataError("the batches hold no target; give a text of at least two tokens.")
    kl_mean, nll_mean, quantised_mean, agreement = (sums / count).tolist()
    return QuantisationLoss(count, kl_mean, math.exp(nll_mean), math.exp(quantised_mean), agreement)


def _targets(labels: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    # The positions whose logits predict a target, and the targets.
    is_target = labels[0] != IGNORE_INDEX
    starts = cu_seqlens[:-1].long()
    is_target[starts[starts < labels.shape[1]]] = False
    positions = is_target.nonzero().squeeze(1)
    return positions - 1, labels[0, positions]
