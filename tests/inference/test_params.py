import dataclasses

import pytest

from kimi_linear.base.errors import ConfigError
from kimi_linear.inference.params import SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", 0),
        ("top_k", 2.0),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("seed", -1),
        ("seed", 1.5),
        ("max_new_tokens", 0),
        ("max_new_tokens", None),
        ("stop_token_ids", 5),
        ("stop_token_ids", (1, -2)),
        ("stop", ("",)),
        ("stop", (3,)),
        ("stop", 3),
    ],
)
def test_a_value_out_of_range_is_one_sentence_that_names_it(field, value):
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**{field: value})
    message = str(caught.value)
    assert field in message
    assert "expected" in message
    assert message.endswith(".")
    assert "\n" not in message


def test_the_edges_of_the_ranges_are_allowed():
    params = SamplingParams(temperature=0, top_k=1, top_p=1, min_p=1, repetition_penalty=100, seed=0, max_new_tokens=1)
    assert params.temperature == 0


def test_lists_and_a_single_string_become_tuples():
    params = SamplingParams(stop="\n", stop_token_ids=[3, 4])
    assert params.stop == ("\n",)
    assert params.stop_token_ids == (3, 4)
    assert params == SamplingParams(stop=["\n"], stop_token_ids=(3, 4))


def test_params_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 2.0
