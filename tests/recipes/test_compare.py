"""Two checkpoints or two engines on the same tokens: the first part that differs is named, and equal ones are equal."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kimi_linear.base.errors import CheckpointError, ConfigError
from kimi_linear.causal_lm import KimiLinearForCausalLM, load_model
from kimi_linear.checkpoint.gguf.export import export_gguf
from kimi_linear.cli.main import app
from kimi_linear.integrations.engines import open_engine
from kimi_linear.models.kimi_linear.presets import preset
from kimi_linear.recipes.compare import OurEngine, Trace, compare, report, weight_error
from kimi_linear.text.tokenizer import Tokenizer
from support.awkward import AWKWARD, lively_model

NAME = "two-dense"
IDS = [5, 6, 7, 100, 299]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model"
    lively_model(NAME).save_pretrained(path)
    return path


def perturbed(directory: Path, target: Path, name: str, factor: float = 1.01) -> Path:
    model = load_model(directory)
    with torch.no_grad():
        model.get_parameter(name).mul_(factor)
    model.save_pretrained(target)
    return target


def test_a_checkpoint_equals_its_copy(directory: Path, tmp_path: Path) -> None:
    load_model(directory).save_pretrained(tmp_path / "copy", max_shard_size="100KB")
    found = compare(OurEngine(directory), OurEngine(tmp_path / "copy"), IDS, steps=5)
    assert {part.error for part in found.parts} == {0.0}
    assert [(part.layer, part.part) for part in found.parts[:3]] == [(-1, "embedding"), (0, "attention"), (0, "ffn")]
    assert len(found.parts) == 1 + 2 * AWKWARD[NAME].num_layers
    assert (found.max_logit, found.relative_logit, found.kl, found.divergence) == (0.0, 0.0, 0.0, None)
    assert (found.agreeing, found.steps, found.first_step) == (5, 5, None)
    assert found.weights is not None
    assert (found.weights.different, found.weights.largest, found.notes) == (0, (), ())
    assert found.weights.tensors > 100


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.2.self_attn.o_proj.weight", (2, "kda", "attention")),
        ("model.layers.3.self_attn.kv_b_proj.weight", (3, "mla", "attention")),
        ("model.layers.4.mlp.experts.w2", (4, "kda", "ffn")),
        ("model.layers.0.mlp.up_proj.weight", (0, "kda", "ffn")),
        ("model.embed_tokens.weight", (-1, "", "embedding")),
    ],
)
def test_the_first_part_that_differs_is_named(
    directory: Path, tmp_path: Path, name: str, place: tuple[int, str, str]
) -> None:
    other = perturbed(directory, tmp_path / "other", name)
    found = compare(OurEngine(directory), OurEngine(other), IDS, steps=2)
    assert found.divergence is not None
    assert (found.divergence.layer, found.divergence.kind, found.divergence.part) == place
    before = found.parts[: found.parts.index(found.divergence)]
    assert {part.error for part in before} <= {0.0}
    assert found.weights is not None
    assert found.weights.largest[0][1] == pytest.approx(0.01, rel=1e-3)
    stored = ".w2.weight" if "experts" in name else name
    assert all(tensor.endswith(stored) for tensor, _ in found.weights.largest)
    assert found.weights.different == (16 if "experts" in name else 1)


def test_a_tolerance_above_the_difference_finds_none(directory: Path, tmp_path: Path) -> None:
    other = perturbed(directory, tmp_path / "other", "model.layers.2.self_attn.o_proj.weight")
    assert compare(OurEngine(directory), OurEngine(other), IDS, steps=0, tolerance=10.0).divergence is None


class Fixed:
    """An engine that says what it was told to."""

    def __init__(self, scores: list[list[float]], greedy: list[int], normalised: bool = False) -> None:
        self.name, self.kinds, self.directory = "fixed", (), None
        self.vocab_size: int | None = len(scores[0])
        self._scores, self._greedy, self._normalised = torch.tensor(scores), greedy, normalised

    def greedy(self, ids: list[int], steps: int) -> list[int]:
        return self._greedy[:steps]

    def trace(self, ids: list[int], last: int) -> Trace:
        return Trace(self._scores[:last], self._normalised)


def test_scores_are_compared_by_their_definitions() -> None:
    a = Fixed([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0], [0.0, 0.0, 1.0]], [2, 0])
    b = Fixed([[0.0, 1.0, 2.5], [0.0, 3.0, 0.0], [0.0, 0.0, 1.0]], [2, 1])
    found = compare(a, b, [1], steps=2)
    assert (found.max_logit, found.agreeing, found.first_step) == (3.0, 1, 1)
    rows = []
    for x, y in zip(a._scores.double(), b._scores.double(), strict=True):
        p, q = x.softmax(-1), y.softmax(-1)
        rows.append(float((p * (p / q).log()).sum()))
    assert found.kl == pytest.approx(sum(rows) / 3)
    size = math.sqrt(1 + 4 + 9 + 1)
    assert found.relative_logit == pytest.approx(math.sqrt(0.25 + 9 + 9) / size, rel=1e-6)
    assert found.notes == ("fixed does not show its layers: only scores are compared.",)


def test_log_probabilities_are_compared_with_logits_as_such() -> None:
    logits = torch.tensor([[0.5, 1.0, 2.0]])
    hidden = torch.cat([logits.log_softmax(-1)[:, :2], torch.tensor([[-torch.inf]])], dim=1)
    found = compare(Fixed((logits + 7).tolist(), []), Fixed(hidden.tolist(), [], True), [1], steps=0)
    assert found.scores == "log-probabilities"
    assert found.max_logit == pytest.approx(float((logits.log_softmax(-1) - hidden.log_softmax(-1))[0, 0].abs()))
    assert math.isfinite(found.kl)


def test_other_widths_compare_by_their_scores(directory: Path, tmp_path: Path) -> None:
    small = dataclasses.replace(preset("tiny"), vocab_size=300)
    KimiLinearForCausalLM(small).save_pretrained(tmp_path / "small")
    found = compare(OurEngine(directory), OurEngine(tmp_path / "small"), IDS, steps=1)
    assert found.parts == ()
    assert found.weights is None
    assert len(found.notes) == 3


def test_the_reference_is_float64_and_leaves_the_environment_alone(directory: Path) -> None:
    before = os.environ.get("KIMI_LINEAR_BACKEND")
    reference = open_engine(f"reference:{directory}")
    found = compare(reference, open_engine(f"ours:{directory}"), IDS, steps=3)
    assert os.environ.get("KIMI_LINEAR_BACKEND") == before
    assert reference.trace(IDS, 2).scores.dtype == torch.float64
    assert 0 < max(part.error for part in found.parts) < 1e-5
    assert found.divergence is None


@pytest.mark.filterwarnings("ignore")
# Its router has no softmax, and it never ties the output head: doctor says so.
@pytest.mark.parametrize("name", sorted(AWKWARD.keys() - {"wide-keys", "two-dense"}))
def test_we_agree_with_transformers(tmp_path: Path, name: str) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'kimi-linear[peers]'")
    lively_model(name).save_pretrained(tmp_path / "model")
    engines = open_engine(f"reference:{tmp_path / 'model'}"), open_engine(f"transformers:{tmp_path / 'model'}")
    found = compare(*engines, [5, 6, 7, 100], steps=4)
    assert found.relative_logit < 1e-4
    assert found.divergence is None
    assert len(found.parts) == 1 + 2 * AWKWARD[name].num_layers
    assert (found.agreeing, found.notes) == (4, ())


def test_llama_cpp_agrees_by_its_probabilities(tmp_path: Path) -> None:
    for package in ("xllamacpp", "gguf"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'kimi-linear[peers]'")
    lively_model("released-order").save_pretrained(tmp_path / "model")
    export_gguf(tmp_path / "model", tmp_path / "m.gguf", "f32")
    llama = open_engine(f"llama.cpp:{tmp_path / 'm.gguf'}")
    found = compare(open_engine(f"reference:{tmp_path / 'model'}"), llama, [5, 6, 7, 100], steps=3)
    assert (found.scores, found.agreeing, found.parts) == ("log-probabilities", 3, ())
    # Its cache is float16.
    assert found.max_logit < 0.05
    assert found.kl < 1e-4
    assert compare(llama, llama, [5, 6], steps=2).agreeing == 2


@pytest.mark.filterwarnings("ignore")
def test_transformers_says_why_it_cannot_load(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'kimi-linear[peers]'")
    with pytest.raises(CheckpointError, match=r"^transformers cannot load [^\n]*\.$"):
        open_engine(f"transformers:{tmp_path}")


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.2], [1.0, 2.0], 0.2 / math.sqrt(5)),
        ([1.0], [0.0], math.inf),
        ([math.nan], [1.0], math.inf),
        ([0.0], [0.0], 0.0),
    ],
)
def test_the_difference_of_two_weights(x: list[float], y: list[float], expected: float) -> None:
    assert weight_error(torch.tensor(x), torch.tensor(y)) == pytest.approx(expected)


def test_weights_of_another_dtype_are_compared_as_numbers() -> None:
    x = torch.tensor([1.0, 1.00001])
    assert weight_error(x.bfloat16(), x) == pytest.approx(1e-5 / math.sqrt(2), rel=1e-2)
    assert weight_error(x.bfloat16(), x.bfloat16().float()) == 0.0


@pytest.mark.parametrize(
    ("ids", "steps", "message"),
    [
        ([], 1, "the prompt holds no token"),
        ([300], 1, "the prompt holds 300, expected token ids from 0 to 299"),
        ([-1], 1, "the prompt holds -1"),
        ([1.5], 1, "the prompt holds 1.5"),
        ([1], -1, "steps is -1"),
    ],
)
def test_a_prompt_that_is_none_is_one_sentence(directory: Path, ids: list[int], steps: int, message: str) -> None:
    engine = OurEngine(directory)
    with pytest.raises(ConfigError, match=message):
        compare(engine, engine, ids, steps=steps)


def test_vocabularies_must_have_one_size(directory: Path) -> None:
    with pytest.raises(ConfigError, match="has 300 tokens and fixed has 3; compare models of one vocabulary"):
        compare(OurEngine(directory), Fixed([[0.0, 0.0, 0.0]], []), [1])


def test_one_token_and_no_step_are_enough(directory: Path) -> None:
    engine = OurEngine(directory)
    found = compare(engine, engine, [1], steps=0)
    assert (found.steps, found.agreeing, found.first_step, found.weights) == (0, 0, None, None)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["compare", *arguments])


def test_the_command_names_the_layer(directory: Path, tmp_path: Path) -> None:
    other = perturbed(directory, tmp_path / "other", "model.layers.3.self_attn.o_proj.weight")
    done = run(str(directory), str(other), "--ids", "5,6,7", "--tokens", "3")
    assert done.exit_code == 0, done.output
    assert "divergence  first beyond 1e-04 behind layer 3 (mla), its attention: " in done.stdout
    assert "layer 2     kda  attention 0.0e+00  ffn 0.0e+00" in done.stdout
    assert "1.0e-02  model.layers.3.self_attn.o_proj.weight" in done.stdout
    found = json.loads(run(str(directory), str(other), "--ids", "5,6,7", "--tokens", "3", "--json").stdout)
    assert (found["divergence"]["layer"], found["divergence"]["part"], found["steps"]) == (3, "attention", 3)
    assert found["weights"]["different"] == 1


def test_a_broken_number_is_null_in_json(directory: Path, tmp_path: Path) -> None:
    other = perturbed(directory, tmp_path / "other", "model.layers.3.self_attn.o_proj.weight", math.nan)
    found = json.loads(run(str(directory), str(other), "--ids", "5", "--tokens", "0", "--json").stdout)
    assert (found["divergence"]["layer"], found["divergence"]["error"]) == (3, None)


def test_text_goes_through_the_tokenizer(directory: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["to be or not to be"], vocab_size=260)
    tokenizer.save(tmp_path / "tokenizer")
    load_model(directory).save_pretrained(tmp_path / "model", tokenizer_from=tmp_path / "tokenizer")
    found = json.loads(run(str(directory), str(tmp_path / "model"), "--prompt", "not to", "--json").stdout)
    assert found["prompt"] == tokenizer.encode("not to")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the prompt as --prompt TEXT or as --ids"),
        (["--ids", "1", "--prompt", "x"], "one of the two"),
        (["--ids", "1,x"], "--ids is '1,x', expected whole numbers"),
        (["--prompt", "x"], "neither checkpoint has a tokenizer"),
    ],
)
def test_the_commands_mistakes_are_one_sentence(directory: Path, arguments: list[str], message: str) -> None:
    done = run(str(directory), str(directory), *arguments)
    assert isinstance(done.exception, (ConfigError, CheckpointError))
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)


@pytest.mark.parametrize("spec", ["reference:", "llama.cpp:nothing.gguf", "ours:nowhere", "nowhere"])
def test_an_engine_that_cannot_be_opened_is_one_sentence(spec: str) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=r"^[^\n]*\.$"):
        open_engine(spec)


def test_the_report_of_equal_engines(directory: Path) -> None:
    engine = OurEngine(directory)
    lines = report(compare(engine, engine, [1, 2], steps=1))
    assert "divergence  none beyond 1e-04" in lines
    assert "tokens      1 of 1 greedy tokens agree" in lines
