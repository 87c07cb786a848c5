"""Bits per byte: against models whose probabilities are known, and against a count by hand."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kimi_linear.base.errors import DataError
from kimi_linear.evaluation.bits_per_byte import bits_per_byte

VOCAB = 16


@dataclass
class Output:
    loss: Tensor


class Bigram(nn.Module):
    """Predicts a token from the one before it; keeps what it was called with."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.calls = []

    def forward(self, input_ids, labels, cu_seqlens):
        self.calls.append(torch.is_grad_enabled())
        targets = functional.pad(labels[:, 1:], (0, 1), value=-100)
        ends = cu_seqlens[1:][cu_seqlens.diff() > 0].long() - 1
        targets[0, ends] = -100
        return Output(functional.cross_entropy(self.logits[input_ids[0]], targets[0]))


def batch(tokens, offsets, num_bytes, ignored=()):
    input_ids = torch.tensor([tokens])
    labels = input_ids.clone()
    labels[0, list(ignored)] = -100
    return input_ids, torch.tensor(offsets, dtype=torch.int32), labels, num_bytes


def test_a_uniform_model_needs_the_bits_of_its_vocabulary():
    model = Bigram(torch.zeros(VOCAB, VOCAB))
    # Four tokens in one sequence: three targets of 4 bits each, spelling 6 bytes.
    assert bits_per_byte(model, [batch([1, 2, 3, 4], [0, 4], 6)]) == pytest.approx(2.0, rel=1e-6)


def test_batches_of_unequal_size_count_by_their_targets():
    model = Bigram(torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0)))
    batches = [
        batch([1, 2, 3, 4, 5], [0, 2, 5], 7),
        batch([6, 7], [0, 2], 2),
        batch([8, 9, 10, 11], [0, 0, 4, 4], 5, ignored=[2]),
    ]
    pairs = [(1, 2), (3, 4), (4, 5), (6, 7), (8, 9), (10, 11)]
    logs = model.logits.detach().double().log_softmax(-1)
    expected = -sum(logs[a, b].item() for a, b in pairs) / math.log(2) / 14
    assert bits_per_byte(model, iter(batches)) == pytest.approx(expected, rel=1e-6)


def test_the_split_into_batches_does_not_matter():
    model = Bigram(torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1)))
    whole = [batch([1, 2, 3, 4, 5, 6], [0, 4, 6], 9)]
    parts = [batch([1, 2, 3, 4], [0, 4], 6), batch([5, 6], [0, 2], 3)]
    assert bits_per_byte(model, whole) == pytest.approx(bits_per_byte(model, parts), rel=1e-6)


def test_a_batch_without_targets_adds_only_its_bytes():
    model = Bigram(torch.zeros(VOCAB, VOCAB))
    batches = [batch([1, 2, 3], [0, 3], 4), batch([4, 5], [0, 1, 2], 4)]
    assert bits_per_byte(model, batches) == pytest.approx(1.0, rel=1e-6)
    assert len(model.calls) == 1


def test_no_gradient_is_kept():
    model = Bigram(torch.zeros(VOCAB, VOCAB))
    bits_per_byte(model, [batch([1, 2], [0, 2], 1)])
    assert model.calls == [False]


@pytest.mark.parametrize("batches", [[], [batch([1, 2], [0, 2], 0)]])
def test_no_text_is_one_sentence(batches):
    with pytest.raises(DataError, match="no byte of text"):
        bits_per_byte(Bigram(torch.zeros(VOCAB, VOCAB)), batches)
