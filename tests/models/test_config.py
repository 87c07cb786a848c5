import dataclasses
from typing import Any

import pytest
import torch

from kimi_linear.base.errors import ConfigError
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.models.kimi_linear.model import KimiLinearLM
from kimi_linear.models.kimi_linear.presets import preset
from support.flops import measured_flops

TINY = preset("tiny")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ("kda_dense", "kda", "mlaa")}, "unknown block 'mlaa': did you mean 'mla'"),
        ({"layers": ()}, "layers is empty"),
        ({"layers": ("kda", "mla")}, r"\['kda_dense'\] stand at no layer"),
        ({"residual": "standart"}, "did you mean 'standard'"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"eos_token_id": 256}, "below vocab_size = 256"),
        ({"pad_token_id": -1}, "at least 0"),
        ({"eos_token_id": [1, 2]}, "whole number"),
    ],
)
def test_contradictory_fields_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_sise": 1}, "did you mean 'vocab_size'"),
        ({"layers": "kda"}, "expected a list of block names"),
        ({"blocks": []}, "expected an object of named blocks"),
        ({"blocks": {"kda": {"mixer": {"kind": "kda", "num_heads": 1}}}}, r"config.blocks.kda: key 'ffn' is missing"),
    ],
)
def test_wrong_plain_values_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KimiLinearConfig.from_dict({**TINY.to_dict(), **change})


def test_a_tied_embedding_counts_once_and_is_built_once() -> None:
    tied = dataclasses.replace(TINY, tie_embeddings=True)
    assert TINY.parameters() - tied.parameters() == 256 * 64
    assert tied.active_parameters() == TINY.active_parameters()
    model = KimiLinearLM(tied)
    assert sum(p.numel() for p in model.parameters()) == tied.parameters()
    assert "lm_head.weight" not in model.state_dict()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        hidden = model.model(ids)
        assert torch.equal(model(ids).logits, hidden @ model.model.embed_tokens.weight.T)


@pytest.mark.parametrize("name", ["tiny", "tiny-gdn", "tiny-mla"])
def test_predicted_flops_equal_the_measured(name: str) -> None:
    config = preset(name)
    model, ids = KimiLinearLM(config), torch.arange(13)[None]
    predicted = sum(config.flops_per_token(context) for context in range(1, 14))
    assert measured_flops(lambda: model(ids)) == predicted


def test_recurrent_layers_cost_the_same_at_any_context() -> None:
    hybrid, full = preset("48b-a3b"), preset("48b-a3b-mla")
    growth = [c.flops_per_token(1_000_001) - c.flops_per_token(1_000_000) for c in (hybrid, full)]
    assert growth[0] * 27 == growth[1] * 7
