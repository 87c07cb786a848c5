"""What a saved checkpoint has beside its weights: model card, generation configuration, tokenizer."""

import json
import re

import pytest
import torch

from kimi_linear.base.errors import CheckpointError, ConfigError
from kimi_linear.causal_lm import KimiLinearForCausalLM, load_model
from kimi_linear.checkpoint.model_card import model_card
from kimi_linear.models.kimi_linear.presets import preset
from kimi_linear.nn.state import Cache


@pytest.fixture(scope="module")
def model():
    return KimiLinearForCausalLM(preset("tiny"), generator=torch.Generator().manual_seed(0)).bfloat16()


def front_matter(text):
    """Return the fields between the two lines of dashes; their values are JSON."""
    head, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert body.startswith("\n# ")
    return {key: json.loads(value) for key, _, value in (line.partition(": ") for line in head.splitlines())}


def rows(text, heading):
    """Return the rows of the table under a heading."""
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", section, re.MULTILINE))


def test_the_card_of_the_released_network_has_its_numbers():
    text = model_card(preset("48b-a3b"))
    network, memory = rows(text, "Network"), rows(text, "Memory of one sequence")
    assert network["parameters"] == "49,122,681,728"
    assert network["active per token"].startswith("3,106,972,544 ")
    assert network["weights"] == "98,245,528,576 bytes in bfloat16"
    assert network["layers"] == "27: 20 Kimi Delta Attention, 7 multi-head latent attention"
    # 43,417,600 bytes of states and 8,064 a token.
    assert memory["1,048,576"] == f"{43_417_600 + 8_064 * 1_048_576:,}"
    assert front_matter(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["kimi_linear", "linear-attention", "mixture-of-experts"],
    }
    assert re.search(r"\b(trained|training|benchmark|score|dataset)", text) is None


def test_the_counts_and_bytes_are_those_of_the_saved_model(model, tmp_path):
    model.save_pretrained(tmp_path / "model", license="apache-2.0", base_model='a: "b"\nlicense: mit')
    text = (tmp_path / "model" / "README.md").read_text()
    network, memory = rows(text, "Network"), rows(text, "Memory of one sequence")
    assert network["parameters"] == f"{sum(p.numel() for p in model.parameters()):,}"
    state = model.new_cache(1)
    with torch.no_grad():
        model(torch.zeros(1, 256, dtype=torch.int64), cache=state)
    assert int(memory["256"].replace(",", "")) == cache_bytes(state)
    given = front_matter(text)
    assert (given["license"], given["base_model"]) == ("apache-2.0", 'a: "b"\nlicense: mit')


def cache_bytes(cache: Cache) -> int:
    """Return the bytes of the tensors that are used; those of latents grow in steps."""
    total = 0
    for state in cache.layers:
        used = int(state.lengths.max()) if hasattr(state, "lengths") else None
        for name, value in vars(state).items():
            if isinstance(value, torch.Tensor) and name != "lengths":
                total += (value if used is None else value[:, :used]).nbytes
    return total


def test_a_card_names_the_engines_that_can_load_the_model():
    released, own = model_card(preset("tiny")), model_card(preset("tiny-gdn"), model_type="kimi_linear_hybrid")
    for engine in ("AutoModelForCausalLM", "vllm serve", "kimi-linear export"):
        assert (engine in released, engine in own) == (True, False)
    assert "kimi_linear_hybrid" in own
    assert front_matter(own)["library_name"] == "kimi_linear"


def test_an_existing_readme_stays(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("mine")
    model.save_pretrained(tmp_path / "model", license="mit")
    assert (tmp_path / "model" / "README.md").read_text() == "mine"


FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


@pytest.mark.parametrize("vocabulary", ["tokenizer.json", "tiktoken.model"])
def test_a_whole_tokenizer_is_carried_and_nothing_of_another_one_stays(model, tmp_path, vocabulary):
    source, target = tmp_path / "source", tmp_path / "model"
    source.mkdir()
    names = [vocabulary, *FILES[1:]]
    for name in names:
        (source / name).write_text(f"new {name}")
    (source / "weights.safetensors").write_text("not carried")
    model.save_pretrained(target)
    for name in ("tokenizer.json", "tiktoken.model"):
        (target / name).write_text("old")
    model.save_pretrained(target, tokenizer_from=source)
    there = {"README.md", "config.json", "generation_config.json", "model.safetensors", *names}
    assert {path.name for path in target.iterdir()} == there
    assert all((target / name).read_text() == f"new {name}" for name in names)
    (target / vocabulary).write_text("changed")
    assert (source / vocabulary).read_text() == f"new {vocabulary}"
    model.save_pretrained(target)
    assert {path.name for path in target.iterdir()} == there


def test_a_tokenizer_that_is_not_there_or_given_twice_is_one_sentence(model, tmp_path):
    (tmp_path / "chat_template.jinja").write_text("")
    with pytest.raises(
        CheckpointError, match=r"holds no tokenizer, expected tokenizer.json or tiktoken.model there\.$"
    ):
        model.save_pretrained(tmp_path / "model", tokenizer_from=tmp_path)
    with pytest.raises(ConfigError, match=r"tokenizer_file and tokenizer_from were both given"):
        model.save_pretrained(tmp_path / "model", tokenizer_from=tmp_path, tokenizer_file="x")
    assert not (tmp_path / "model").exists()


def test_every_end_token_is_written_and_read_back(model, tmp_path):
    model.end_token_ids = (7, 9)
    try:
        model.save_pretrained(tmp_path / "model")
    finally:
        model.end_token_ids = ()
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text()) == {"eos_token_id": [7, 9]}
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "eos_token_id": [5, 6]}))
    assert load_model(tmp_path / "model").end_token_ids == (5, 6, 7, 9)
