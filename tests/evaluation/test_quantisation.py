"""Quantisation loss: against a computation by hand, and on a model trained to know something."""

import math

import pytest
import torch
from torch import nn

from kimi_linear.base.errors import DataError
from kimi_linear.evaluation.quantisation import quantisation_loss, quantised_copy
from kimi_linear.models.kimi_linear.model import KimiLinearLM
from kimi_linear.models.kimi_linear.presets import preset
from kimi_linear.nn.ffn.moe import Experts
from kimi_linear.ops.linear import PackedLinear
from support import ops

pytestmark = ops.NATIVE


def batch(T: int, vocabulary: int = 256, seed: int = 0):
    input_ids = torch.randint(vocabulary, (1, T), generator=torch.Generator().manual_seed(seed))
    labels = input_ids.clone()
    labels[0, 5] = -100
    return input_ids, torch.tensor([0, T // 3, T], dtype=torch.int32), labels, T


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return KimiLinearLM(preset("tiny")).eval()


@torch.no_grad()
def test_the_loss_is_the_formula(model):
    ids, offsets, *_ = batch(40)
    loss = quantisation_loss(model, [batch(40)], "int4")
    positions = [t for t in range(40) if t not in (0, 13, 5)]
    before = model(ids, cu_seqlens=offsets).logits[0].double().log_softmax(-1)
    after = quantised_copy(model, "int4")(ids, cu_seqlens=offsets).logits[0].double().log_softmax(-1)
    rows = [t - 1 for t in positions]
    kl = (before[rows].exp() * (before[rows] - after[rows])).sum(-1).mean().item()
    targets = ids[0, positions]
    assert loss.targets == len(positions)
    assert loss.kl == pytest.approx(kl, rel=1e-3)
    assert loss.perplexity == pytest.approx(math.exp(-before[rows, targets].mean().item()), rel=1e-5)
    assert loss.quantised_perplexity == pytest.approx(math.exp(-after[rows, targets].mean().item()), rel=1e-5)
    assert loss.agreement == pytest.approx((before[rows].argmax(-1) == after[rows].argmax(-1)).double().mean().item())


def test_finer_formats_lose_less(model):
    losses = {
        name: quantisation_loss(model, [batch(64), batch(48, seed=1)], name) for name in ("int4", "int8", "float32")
    }
    assert losses["float32"].kl < 1e-9
    assert losses["float32"].kl < losses["int8"].kl < losses["int4"].kl / 20
    assert losses["float32"].targets == 63 - 2 + 48 - 3


def test_the_model_stays_and_every_matrix_of_the_copy_is_packed(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copy = quantised_copy(model, "int4")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    experts = 0
    for name, part in copy.named_modules():
        if isinstance(part, nn.Linear):
            original = before[f"{name}.weight"]
            expected = PackedLinear(original, format="int4")
            if name != "lm_head":
                assert torch.equal(part.weight, expected.weight())
            x = torch.randn(3, part.in_features)
            assert torch.equal(part(x), expected(x))
        elif isinstance(part, Experts):
            assert torch.equal(part.w2[1], PackedLinear(before[f"{name}.w2"][1], format="int4").weight())
            experts += 1
    assert experts > 0
    assert torch.equal(copy.model.embed_tokens.weight, before["model.embed_tokens.weight"])


def test_no_target_is_an_error(model):
    ids, _, labels, size = batch(8)
    with pytest.raises(DataError, match="no target"):
        quantisation_loss(model, [(ids, torch.arange(9), labels, size)], "int8")
