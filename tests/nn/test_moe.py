"""Routed experts: the equations, the selection bias, and its update."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kimi_linear.base.numerics import relative_error, tolerance
from kimi_linear.nn.ffn import MoEConfig
from kimi_linear.nn.ffn.moe import MixtureOfExperts

HIDDEN = 12
CONFIG = MoEConfig(num_experts=6, top_k=2, intermediate_size=10, num_shared_experts=2, scaling=2.446)


def build(config: MoEConfig = CONFIG) -> MixtureOfExperts:
    torch.manual_seed(0)
    layer = MixtureOfExperts(config, HIDDEN).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def inputs(tokens: int, seed: int = 1) -> Tensor:
    return torch.randn(tokens, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_the_output_follows_the_equations_token_by_token() -> None:
    layer, x = build(), inputs(20)
    expected = torch.zeros_like(x)
    for t, token in enumerate(x):
        scores = (layer.gate.weight @ token).sigmoid()
        chosen = (scores + layer.gate.e_score_correction_bias).topk(2).indices
        weights = 2.446 * scores[chosen] / (scores[chosen].sum() + 1e-20)
        for weight, e in zip(weights, chosen, strict=True):
            inner = F.silu(layer.experts.w1[e] @ token) * (layer.experts.w3[e] @ token)
            expected[t] += weight * (layer.experts.w2[e] @ inner)
        shared = layer.shared_experts
        expected[t] += shared.down_proj(F.silu(shared.gate_proj(token)) * shared.up_proj(token))
    assert relative_error(layer(x), expected) <= tolerance(torch.float64).output


@torch.no_grad()
def test_the_bias_selects_and_never_weighs() -> None:
    layer, x = build(), inputs(20)
    layer.gate.e_score_correction_bias.zero_()
    weights, experts = layer.gate(x)
    # The same for every expert: the choice stays, and so must the weights.
    layer.gate.e_score_correction_bias.fill_(3.0)
    shifted_weights, shifted_experts = layer.gate(x)
    assert torch.equal(experts, shifted_experts)
    assert torch.equal(weights, shifted_weights)
    layer.gate.e_score_correction_bias[4] = 100.0
    assert bool((layer.gate(x)[1] == 4).any(dim=1).all())


def test_the_bias_takes_no_gradient_and_no_optimiser_step() -> None:
    layer = build()
    layer(inputs(20)).sum().backward()
    bias = layer.gate.e_score_correction_bias
    assert not bias.requires_grad
    assert bias.grad is None
    assert "gate.e_score_correction_bias" in dict(layer.named_parameters())


def test_counts_accumulate_in_training_only_until_the_update() -> None:
    layer = build()
    layer.eval()(inputs(50))
    assert layer.gate.expert_counts is None
    layer.train()
    layer(inputs(20))
    layer(inputs(10, seed=2))
    counts = layer.gate.expert_counts
    assert counts is not None
    assert int(counts.sum()) == 2 * 30
    with torch.no_grad():
        chosen = torch.cat([layer.eval().gate(inputs(20))[1], layer.gate(inputs(10, seed=2))[1]])
    assert torch.equal(counts, chosen.flatten().bincount(minlength=6))
    layer.update_router_bias()
    assert layer.gate.expert_counts is None


def test_counts_are_never_part_of_a_checkpoint() -> None:
    layer = build()
    layer(inputs(5))
    assert set(layer.state_dict()) == {name for name, _ in layer.named_parameters()}


def test_the_update_moves_each_bias_one_step_against_its_load() -> None:
    layer = build()
    before = layer.gate.e_score_correction_bias.clone()
    layer.gate.expert_counts = torch.tensor([0, 10, 4, 5, 1, 4])
    layer.update_router_bias()
    steps = (layer.gate.e_score_correction_bias - before) / CONFIG.bias_update_rate
    torch.testing.assert_close(steps, torch.tensor([1.0, -1.0, 0.0, -1.0, 1.0, 0.0], dtype=torch.float64))


def test_an_update_without_counts_changes_nothing() -> None:
    layer = build()
    before = layer.gate.e_score_correction_bias.clone()
    layer.update_router_bias()
    assert torch.equal(layer.gate.e_score_correction_bias, before)


def test_updates_balance_a_skewed_router() -> None:
    layer = build(MoEConfig(num_experts=6, top_k=2, intermediate_size=4, bias_update_rate=0.02))
    x = inputs(500)
    with torch.no_grad():
        layer.gate.e_score_correction_bias.zero_()
        # Expert 0 wins on every token at first.
        layer.gate.weight[0] = 0.0
        layer.gate.weight[1:] *= 0.1
        layer.gate.e_score_correction_bias[0] = 0.5

        def imbalance() -> float:
            layer.gate(x)
            counts = layer.gate.expert_counts
            assert counts is not None
            return float(counts.max() / counts.double().mean())

        before = imbalance()
        layer.update_router_bias()
        for _ in range(60):
            layer.gate(x)
            layer.update_router_bias()
        after = imbalance()
    assert before == pytest.approx(3.0)
    assert after < 1.5


def test_an_expert_without_tokens_has_a_zero_gradient() -> None:
    layer = build()
    with torch.no_grad():
        layer.gate.e_score_correction_bias[:] = torch.tensor([5.0, 5.0, 0.0, 0.0, 0.0, 0.0])
    layer(inputs(9)).sum().backward()
    assert float(layer.experts.w1.grad[2:].abs().max()) == 0.0
    assert float(layer.experts.w1.grad[:2].abs().min(dim=0).values.max()) > 0.0
