import dataclasses
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import kimi_linear
from kimi_linear.base.errors import ConfigError, ShapeError
from kimi_linear.causal_lm import KimiLinearForCausalLM
from kimi_linear.inference.generate import generate
from kimi_linear.inference.params import SamplingParams
from kimi_linear.models.kimi_linear.presets import preset


def build(**changes):
    config = dataclasses.replace(preset("tiny"), initializer_range=0.2, **changes)
    return KimiLinearForCausalLM(config, generator=torch.Generator().manual_seed(0)).eval()


@pytest.fixture(scope="module")
def model():
    return build()


def test_generate_returns_the_prompt_and_what_follows(model):
    prompt = torch.tensor([[5, 9, 2], [1, 2, 3]])
    params = SamplingParams(temperature=0.0, max_new_tokens=4)
    ids = model.generate(prompt, params)
    assert ids.dtype == torch.int64
    assert torch.equal(ids[:, :3], prompt)
    assert ids[:, 3:].tolist() == [list(row) for row in generate(model, prompt, params).ids]


def test_settings_may_be_given_by_name(model):
    by_name = model.generate([[5, 9]], max_new_tokens=4, temperature=2.0, seed=1)
    assert torch.equal(by_name, model.generate([[5, 9]], SamplingParams(max_new_tokens=4, temperature=2.0, seed=1)))
    assert by_name.shape == (1, 6)


def test_one_row_may_be_given_flat(model):
    flat = model.generate(torch.tensor([5, 9, 2]), max_new_tokens=2, temperature=0.0)
    assert torch.equal(flat, model.generate([5, 9, 2], max_new_tokens=2, temperature=0.0))
    assert flat.shape == (1, 5)


def test_the_new_tokens_begin_behind_the_columns_of_the_prompt(model):
    left, left_mask = torch.tensor([[0, 0, 7], [1, 2, 3]]), torch.tensor([[0, 0, 1], [1, 1, 1]])
    right, right_mask = torch.tensor([[7, 0, 0], [1, 2, 3]]), torch.tensor([[1, 0, 0], [1, 1, 1]])
    options = {"max_new_tokens": 3, "temperature": 0.0}
    of_lists = model.generate([[7], [1, 2, 3]], **options)
    of_left = model.generate(left, attention_mask=left_mask, **options)
    of_right = model.generate(right, attention_mask=right_mask, **options)
    assert torch.equal(of_left[:, :3], left)
    assert torch.equal(of_right[:, :3], right)
    assert torch.equal(of_right[:, 3:], of_left[:, 3:])
    assert torch.equal(of_lists, of_left)


@pytest.mark.parametrize(
    ("special", "fill"), [({"pad_token_id": 99, "eos_token_id": 98}, 99), ({"eos_token_id": 98}, 98), ({}, 0)]
)
def test_rows_that_end_early_are_padded_on_the_right(special, fill):
    model = build(**special)
    prompts, options = [[7, 4], [1]], {"max_new_tokens": 5, "temperature": 0.0}
    free = model.generate(prompts, stop_token_ids=(), **options)
    stop = int(free[1, 4])
    assert stop not in free[0, 2:].tolist()
    ids = model.generate(prompts, stop_token_ids=(stop,), **options)
    assert ids[1].tolist() == [fill, *free[1, 1:5].tolist(), fill, fill]
    assert torch.equal(ids[0], free[0])


def test_the_models_end_tokens_stop_it(model):
    free = model.generate([[7, 4]], max_new_tokens=5, temperature=0.0)
    other = build()
    other.end_token_ids = (int(free[0, 3]),)
    assert other.generate([[7, 4]], max_new_tokens=5, temperature=0.0).tolist() == free[:, :4].tolist()
    assert [event.finish_reason for event in other.stream([[7, 4]], max_new_tokens=5, temperature=0.0)] == [
        None,
        "stop",
    ]
    assert other.generate([[7, 4]], max_new_tokens=5, temperature=0.0, stop_token_ids=()).tolist() == free.tolist()


def test_stream_yields_the_tokens_of_generate(model):
    options = {"max_new_tokens": 6, "temperature": 1.5, "seed": 2}
    events = list(model.stream([[5, 9]], **options))
    assert [event.token_id for event in events] == model.generate([[5, 9]], **options)[0, 2:].tolist()


def test_wrong_settings_are_one_sentence(model):
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        model.generate([[1]], temprature=0.5)
    with pytest.raises(ConfigError, match="params and seed were both given"):
        model.generate([[1]], SamplingParams(), seed=1)
    with pytest.raises(ConfigError, match="top_p is 2"):
        model.stream([[1]], top_p=2)
    with pytest.raises(ShapeError, match="encode the text first"):
        model.generate("Hello")


def test_the_version_is_that_of_the_distribution():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert kimi_linear.__version__ == project["version"]


def test_importing_the_package_and_reading_a_preset_load_no_torch():
    code = "import sys, kimi_linear as k; k.preset('tiny'); k.KimiLinearConfig; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
