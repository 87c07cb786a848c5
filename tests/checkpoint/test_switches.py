"""Two ways of reading the same checkpoint: the latent norm's epsilon, and experts weighed with the selection bias."""

import json

import pytest
import torch

from kimi_linear.base.errors import ConfigError
from kimi_linear.base.numerics import relative_error
from kimi_linear.causal_lm import KimiLinearForCausalLM, load_model
from kimi_linear.models.kimi_linear.presets import preset
from kimi_linear.nn.ffn.moe import MixtureOfExperts
from support import ops
from support.awkward import AWKWARD, lively_model, prompt, with_latent_norm_eps


@pytest.fixture(scope="module", params=["odd-heads", "wide-keys", "first-mla"])
def saved(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "model"
    lively_model(request.param).save_pretrained(directory)
    return request.param, directory


@torch.no_grad()
def logits(model, name):
    return model(prompt(name)).logits


def biased_by_hand(model):
    """Return a model whose expert layers weigh as the published code does, written out from the scores."""
    for layer in model.modules():
        if isinstance(layer, MixtureOfExperts):
            layer.gate.forward = weigh(layer.gate)
    return model


def weigh(gate):
    def forward(x):
        z = x.double() @ gate.weight.double().T
        scores = z.sigmoid() if gate.config.activation == "sigmoid" else z.softmax(-1)
        scores += gate.e_score_correction_bias.double()  # in place, so that what is gathered below has it
        experts = scores.topk(gate.config.top_k, dim=-1).indices
        weights = scores.gather(-1, experts)
        if gate.config.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return (weights * gate.config.scaling).to(torch.float64), experts

    return forward


def test_biased_combine_is_the_published_rule(saved):
    name, directory = saved
    expected = logits(biased_by_hand(load_model(directory, "float64")), name)
    found = logits(load_model(directory, "float64", biased_combine=True), name)
    assert relative_error(found, expected) < 1e-12
    if not (AWKWARD[name].layer_blocks[-1].ffn.top_k == 1 and AWKWARD[name].layer_blocks[-1].ffn.renormalize):
        assert relative_error(logits(load_model(directory, "float64"), name), expected) > 1e-3


def test_biased_combine_in_float32_follows_float64(saved):
    name, directory = saved
    exact = logits(load_model(directory, "float64", biased_combine=True), name)
    assert relative_error(logits(load_model(directory, "float32", biased_combine=True), name), exact) < 1e-5


@ops.NATIVE
def test_a_prepared_model_weighs_as_the_plain_one(saved):
    name, directory = saved
    plain = load_model(directory, "float32", biased_combine=True)
    packed = load_model(directory, "float32", biased_combine=True, weights="float32")
    with torch.no_grad():
        cache, other = plain.new_cache(1), packed.new_cache(1)
        for ids in (prompt(name)[:, :7], prompt(name)[:, 7:8], prompt(name)[:, 8:9]):
            a, b = plain(ids, cache=cache).logits, packed(ids, cache=other).logits
            assert relative_error(b, a) < 1e-5


def test_the_epsilon_of_the_latent_norm_is_what_was_asked_for(saved):
    name, directory = saved
    expected = KimiLinearForCausalLM(with_latent_norm_eps(AWKWARD[name], 0.5)).double().eval()
    expected.load_state_dict(load_model(directory, "float64").state_dict())
    found = load_model(directory, "float64", latent_norm_eps=0.5)
    assert torch.equal(logits(found, name), logits(expected, name))
    assert relative_error(logits(load_model(directory, "float64"), name), logits(found, name)) > 1e-3


def test_without_switches_nothing_changes(saved):
    name, directory = saved
    assert load_model(directory).config.layer_blocks == AWKWARD[name].layer_blocks


def test_a_model_read_with_the_other_epsilon_keeps_the_released_type(tmp_path):
    model = KimiLinearForCausalLM(preset("tiny"))
    model.save_pretrained(tmp_path / "a")
    load_model(tmp_path / "a", latent_norm_eps=1e-5).save_pretrained(tmp_path / "b")
    given = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (given["model_type"], given["latent_norm_eps"]) == ("kimi_linear", 1e-5)
    assert load_model(tmp_path / "b").config == with_latent_norm_eps(preset("tiny"), 1e-5)
    assert load_model(tmp_path / "b", latent_norm_eps=1e-6).config == preset("tiny")


@pytest.mark.parametrize("switches", [{"biased_combine": True}, {"latent_norm_eps": 1e-3}], ids=str)
def test_a_model_that_no_other_engine_would_compute_gets_our_own_type(tmp_path, switches):
    KimiLinearForCausalLM(preset("tiny")).save_pretrained(tmp_path / "a")
    switched = load_model(tmp_path / "a", **switches)
    switched.save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["model_type"] == "kimi_linear_hybrid"
    assert load_model(tmp_path / "b").config == switched.config


def test_no_gradient_reaches_the_bias_that_weighs():
    layer = MixtureOfExperts(preset("tiny").blocks["kda"].ffn, 8)
    layer.gate.config = type(layer.config)(**{**vars(layer.config), "biased_combine": True})
    layer.gate.e_score_correction_bias.requires_grad_().data.uniform_(-0.1, 0.1)
    layer(torch.randn(5, 8)).sum().backward()
    assert layer.gate.e_score_correction_bias.grad is None
    assert float(layer.gate.weight.grad.abs().max()) > 0


@pytest.mark.parametrize(
    ("name", "switches", "message"),
    [
        ("tiny", {"latent_norm_eps": 0.0}, "latent_norm_eps is 0.0, expected a positive number"),
        ("tiny", {"latent_norm_eps": float("nan")}, "expected a positive number"),
        ("tiny", {"latent_norm_eps": "1e-5"}, "latent_norm_eps is '1e-5'"),
        ("linear", {"latent_norm_eps": 1e-5}, "latent_norm_eps was given and the model has no mla layer"),
        ("dense", {"biased_combine": True}, "biased_combine was given and the model has no moe layer"),
    ],
)
def test_a_switch_that_changes_nothing_is_refused(tmp_path, name, switches, message):
    tiny = preset("tiny")
    layers = {"tiny": tiny.layers, "linear": ("kda",), "dense": ("kda_dense",)}[name]
    config = type(tiny)(
        **{**vars(tiny), "layers": layers, "blocks": {key: tiny.blocks[key] for key in dict.fromkeys(layers)}}
    )
    KimiLinearForCausalLM(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=message):
        load_model(tmp_path / "model", **switches)
