"""Precision: what autocast does, and a choice by measurement that leaves the model as it was."""

import copy

import pytest
import torch

from kimi_linear.training import precision
from kimi_linear.training.precision import Precision, autocast, choose_precision
from training.toy import ToyBatches, ToyLM

CPU = torch.device("cpu")


def loss(model):
    batch = next(ToyBatches())
    return model(batch.input_ids, batch.labels).loss


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_name_decides_the_arithmetic_of_matrices(name, dtype):
    with autocast(name, CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize(
    ("fp32", "bf16", "name"), [(1.0, 0.5, "bf16"), (1.0, 0.94, "bf16"), (1.0, 0.96, "fp32"), (1.0, 3.0, "fp32")]
)
def test_bf16_is_chosen_only_where_it_is_worthwhile(monkeypatch, fp32, bf16, name):
    # The first of each warms up; one outlier in three does not count.
    taken = {"fp32": iter([99.0, fp32, 50.0, fp32]), "bf16": iter([0.0, bf16, bf16, 50.0])}
    monkeypatch.setattr(precision, "_time", lambda trial, loss, name, device: next(taken[name]))
    assert choose_precision(ToyLM(), loss, CPU) == Precision(name, fp32, bf16)


def test_measuring_takes_real_time_and_leaves_no_trace():
    model = ToyLM()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    seen = []

    def drawing_loss(trial):
        torch.rand(3)
        seen.append(trial)
        return loss(trial)

    choice = choose_precision(model, drawing_loss, CPU)
    assert choice.name in {"fp32", "bf16"}
    assert choice.fp32_seconds > 0
    assert choice.bf16_seconds > 0
    assert len(seen) == 8
    assert all(trial is not model for trial in seen)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
