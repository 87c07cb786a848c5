"""Parameter groups, Muon over stacked weights, and optimizer state as plain tensors."""

import copy
import math

import pytest
import torch
from torch import nn

from kimi_linear.base.errors import CheckpointError, ConfigError, DtypeError
from kimi_linear.training.optim import OptimConfig, build_optimizers
from training.toy import ToyBatches, ToyLM

STACK = (3, 6, 4)


class Stack(nn.Module):
    """Stacked weights alone."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(STACK, generator=torch.Generator().manual_seed(1)))


def gradients(steps):
    return torch.randn(steps, *STACK, generator=torch.Generator().manual_seed(2))


def decayed(optimizers):
    return {name for group in optimizers.groups() if group["weight_decay"] > 0 for name in group["parameters"]}


def steps(model, optimizers, count, batches=None):
    batches = batches or ToyBatches()
    for _ in range(count):
        batch = next(batches)
        model(batch.input_ids, batch.labels).loss.backward()
        optimizers.step(1.0)


def test_muon_on_a_stack_equals_muon_on_separate_matrices():
    model = Stack()
    config = OptimConfig(learning_rate=0.02, weight_decay=0.3)
    separate = [nn.Parameter(matrix.clone()) for matrix in model.w1.detach()]
    expected = torch.optim.Muon(separate, lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    optimizers = build_optimizers(model, config)
    for gradient in gradients(4):
        model.w1.grad = gradient.clone()
        optimizers.step(1.0)
        for matrix, own in zip(separate, gradient, strict=True):
            matrix.grad = own.clone()
        expected.step()
    found, wanted = model.w1.detach(), torch.stack([matrix.detach() for matrix in separate])
    # torch rounds every intermediate to bfloat16, so the two differ by such roundings of updates of size 0.02 * 0.2.
    torch.testing.assert_close(found, wanted, rtol=0, atol=4 * 0.02 * 0.2 * 6**0.5 * 2e-2)


def test_muon_state_survives_saving_in_the_middle():
    whole, broken = Stack(), Stack()
    whole_optimizers, first = build_optimizers(whole, OptimConfig()), build_optimizers(broken, OptimConfig())
    for i, gradient in enumerate(gradients(6)):
        if i == 3:
            saved = {name: tensor.clone() for name, tensor in first.state_tensors().items()}
            broken = copy.deepcopy(broken)
            first = build_optimizers(broken, OptimConfig())
            first.load_state_tensors(saved)
        for model, optimizers in ((whole, whole_optimizers), (broken, first)):
            model.w1.grad = gradient.clone()
            optimizers.step(1.0)
    assert torch.equal(whole.w1, broken.w1)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_state_survives_saving_for_every_kind_of_parameter(name):
    config = OptimConfig(name=name)
    model = ToyLM()
    optimizers, batches = build_optimizers(model, config), ToyBatches()
    steps(model, optimizers, 3, batches)
    restored = copy.deepcopy(model)
    again = build_optimizers(restored, config)
    again.load_state_tensors({key: tensor.clone() for key, tensor in optimizers.state_tensors().items()})
    position = batches.state()
    steps(model, optimizers, 3, batches)
    batches.load_state(position)
    steps(restored, again, 3, batches)
    for (key, x), y in zip(model.state_dict().items(), restored.state_dict().values(), strict=True):
        assert torch.equal(x, y), key


def test_muon_takes_the_hidden_matrices_and_nothing_else():
    groups = build_optimizers(ToyLM(), OptimConfig()).groups()
    muon = [name for group in groups if group["optimizer"] == "muon" for name in group["parameters"]]
    assert muon == ["self_attn.q_proj.weight", "mlp.w1", "mlp.gate.weight"]


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_no_decay_on_the_exempted_parameters(name):
    optimizers = build_optimizers(ToyLM(), OptimConfig(name=name))
    every = {parameter for group in optimizers.groups() for parameter in group["parameters"]}
    exempt = {"self_attn.A_log", "self_attn.dt_bias", "self_attn.q_conv1d.weight", "self_attn.o_norm.weight"}
    assert every - decayed(optimizers) == exempt
    without = build_optimizers(ToyLM(), OptimConfig(name=name, decay_embeddings=False))
    assert every - decayed(without) == exempt | {"embed_tokens.weight"}


def test_weight_decay_alone_shrinks_the_decayed_and_leaves_the_rest():
    model = ToyLM()
    before = copy.deepcopy(model)
    optimizers = build_optimizers(model, OptimConfig(learning_rate=0.5, weight_decay=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers.step(0.2)
    for name, parameter in model.named_parameters():
        old = before.get_parameter(name)
        is_decayed = name in decayed(optimizers)
        expected = old * (1 - 0.5 * 0.2 * 0.1) if is_decayed else old
        torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=0)


def test_muon_update_has_the_size_of_an_adamw_update():
    torch.manual_seed(0)
    model = nn.Linear(256, 128, bias=False)
    before = model.weight.detach().clone()
    optimizers = build_optimizers(model, OptimConfig(learning_rate=1.0, weight_decay=0.0))
    model.weight.grad = torch.randn(128, 256)
    optimizers.step(1.0)
    rms = (model.weight.detach() - before).square().mean().sqrt().item()
    assert 0.15 <= rms <= 0.21


def test_muon_brings_every_singular_value_near_one():
    # A matrix this wide has singular values far from zero, which the iteration maps into [0.681, 1.135].
    torch.manual_seed(0)
    model = nn.Linear(1024, 256, bias=False)
    nn.init.zeros_(model.weight)
    optimizers = build_optimizers(model, OptimConfig(learning_rate=1.0))
    model.weight.grad = torch.randn(256, 1024)
    optimizers.step(1.0)
    values = torch.linalg.svdvals(model.weight.detach()) / (0.2 * math.sqrt(1024))
    assert 0.68 <= values.min().item() <= values.max().item() <= 1.14


def test_muon_update_does_not_depend_on_the_scale_of_the_gradient():
    updates = []
    for scale in (1.0, 1024.0):
        model = Stack()
        optimizers = build_optimizers(model, OptimConfig(weight_decay=0.0))
        model.w1.grad = gradients(1)[0] * scale
        optimizers.step(1.0)
        updates.append(model.w1.detach() - Stack().w1.detach())
    assert torch.equal(*updates)


def test_muon_of_a_transpose_is_the_transpose():
    gradient = gradients(1)[0, 0]
    updates = []
    for g in (gradient, gradient.mT.contiguous()):
        model = nn.Linear(*g.mT.shape, bias=False)
        nn.init.zeros_(model.weight)
        optimizers = build_optimizers(model, OptimConfig(learning_rate=1.0))
        model.weight.grad = g
        optimizers.step(1.0)
        updates.append(model.weight.detach())
    torch.testing.assert_close(updates[0], updates[1].mT, rtol=2e-2, atol=2e-2)


def test_a_step_uses_its_gradients_once():
    model = Stack()
    optimizers = build_optimizers(model, OptimConfig())
    model.w1.grad = gradients(1)[0]
    optimizers.step(1.0)
    assert model.w1.grad is None
    after_one = model.w1.detach().clone()
    optimizers.step(1.0)
    assert torch.equal(model.w1, after_one), "a gradient was used twice"
    model.w1.grad = gradients(1)[0]
    optimizers.step(1.0)
    assert not torch.equal(model.w1, after_one)


def test_parameters_without_a_gradient_stay_as_they_are():
    model = ToyLM()
    frozen = model.self_attn.A_log.requires_grad_(False)
    before = frozen.clone()
    optimizers = build_optimizers(model, OptimConfig())
    steps(model, optimizers, 2)
    assert torch.equal(frozen, before)
    assert not any("A_log" in name for name in optimizers.state_tensors())


def test_tied_embeddings_are_optimized_once():
    groups = build_optimizers(ToyLM(tie_embeddings=True), OptimConfig()).groups()
    names = [name for group in groups for name in group["parameters"]]
    assert "embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_weights_below_float32_are_refused():
    with pytest.raises(DtypeError, match=r"is torch\.bfloat16, expected torch\.float32"):
        build_optimizers(ToyLM().bfloat16(), OptimConfig())


def test_a_parameter_no_rule_covers_is_refused():
    model = nn.Module()
    model.patch = nn.Parameter(torch.zeros(2, 2, 2, 2))
    with pytest.raises(ConfigError, match="patch has shape"):
        build_optimizers(model, OptimConfig())


def test_nothing_to_train_is_refused():
    with pytest.raises(ConfigError, match="nothing to train"):
        build_optimizers(ToyLM().requires_grad_(False), OptimConfig())


def test_state_of_another_model_is_refused():
    model = Stack()
    optimizers = build_optimizers(model, OptimConfig())
    with pytest.raises(CheckpointError, match="does not have"):
        optimizers.load_state_tensors({"muon/w9/momentum_buffer": torch.zeros(6, 4)})
    with pytest.raises(CheckpointError, match=r"is \(2, 2\), expected \(3, 6, 4\)"):
        optimizers.load_state_tensors({"muon/w1/momentum_buffer": torch.zeros(2, 2)})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "sgd"}, "unknown optimizer 'sgd'"),
        ({"learning_rate": 0.0}, "learning_rate 0.0"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"momentum": -0.1}, "momentum -0.1"),
    ],
)
def test_impossible_constants_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        OptimConfig(**fields)
