"""The training recipe: one directory, run again and again."""

import fcntl
import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from kimi_linear.base.errors import CheckpointError, ConfigError, DataError
from kimi_linear.causal_lm import KimiLinearForCausalLM
from kimi_linear.evaluation.bits_per_byte import bits_per_byte
from kimi_linear.recipes.train import DataConfig, RunConfig, train
from kimi_linear.training.callbacks import Callback, read_metrics
from kimi_linear.training.checkpoint import resumable_with
from kimi_linear.training.data import Tokenizer, TokenShards, ValidationBatches
from training.runs import config, plain_config, write_text


class Stop(Callback):
    """Sends SIGTERM after a step."""

    def __init__(self, step):
        self.step = step

    def on_step(self, record):
        if record.step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path)


def run(config, **options):
    said = []
    return train(config, report=said.append, **options), said


def losses(directory):
    return [entry["loss"] for entry in read_metrics(directory / "metrics.jsonl") if entry["kind"] == "step"]


def test_a_run_fills_its_directory(tmp_path, text):
    result, said = run(config(tmp_path, text, eval_every=4))
    directory = tmp_path / "run"
    assert (result.status, result.step, result.tokens) == ("finished", 6, 6 * 48)
    names = {"config.json", "tokenizer.json", "data", "checkpoints", "metrics.jsonl", "model", "result.json", ".lock"}
    assert {path.name for path in directory.iterdir()} == names
    assert json.loads((directory / "result.json").read_text())["metrics"] == result.metrics
    kinds = [(entry["kind"], entry["step"]) for entry in read_metrics(directory / "metrics.jsonl")]
    assert kinds == [("step", s) for s in (1, 2, 3, 4)] + [("eval", 4), ("step", 5), ("step", 6), ("eval", 6)]
    assert said == [f"preparing {text}", "measuring bits per byte on all held-out text"]


def test_the_saved_model_is_the_trained_one_and_has_the_bits_per_byte_stated(tmp_path, text):
    result, _ = run(config(tmp_path, text))
    directory = tmp_path / "run"
    saved = load_file(directory / "model" / "model.safetensors")
    trained = load_file(directory / "checkpoints" / "step-00000006" / "model.safetensors")
    assert torch.equal(saved["model.embed_tokens.weight"], trained["model.embed_tokens.weight"])
    assert (directory / "model" / "tokenizer.json").read_text() == (directory / "tokenizer.json").read_text()
    model = KimiLinearForCausalLM.from_pretrained(result.model_dir, dtype="float32").eval()
    assert model.config.eos_token_id == Tokenizer.load(directory).eos_id
    batches = ValidationBatches(TokenShards(directory / "data" / "validation"), seq_len=24, batch_size=3)
    measured = bits_per_byte(model, ((b.input_ids, b.cu_seqlens, b.labels, b.num_bytes) for b in batches))
    assert measured == pytest.approx(result.metrics["bits_per_byte"], rel=1e-5)


def test_training_lowers_bits_per_byte(tmp_path, text):
    plain = plain_config(tmp_path, text, max_steps=30, eval_every=1)
    plain["optim"] = {"learning_rate": 0.01}
    result, _ = run(RunConfig.from_dict(plain))
    found = [e["bits_per_byte"] for e in read_metrics(tmp_path / "run" / "metrics.jsonl") if e["kind"] == "eval"]
    assert result.metrics["bits_per_byte"] < 0.8 * found[0]


def test_a_finished_run_says_so_and_is_left_alone(tmp_path, text):
    first, _ = run(config(tmp_path, text))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "model").iterdir()}
    second, said = run(config(tmp_path, text))
    assert second == first
    assert said == [f"{tmp_path / 'run'} is finished (6 steps); delete it or choose another to train again."]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "model").iterdir()} == times


def test_a_stopped_run_goes_on_and_ends_like_an_unbroken_one(tmp_path, text):
    (tmp_path / "whole").mkdir()
    whole, _ = run(config(tmp_path / "whole", text, eval_every=2))
    stopped, said = run(config(tmp_path, text, eval_every=2), callbacks=[Stop(3)])
    assert (stopped.status, stopped.step) == ("interrupted", 3)
    assert "stopped at step 3; run the same command again" in said[-1]
    assert not (tmp_path / "run" / "result.json").exists()
    finished, said = run(config(tmp_path, text, eval_every=2))
    assert finished.status == "finished"
    assert finished.metrics == whole.metrics
    assert losses(tmp_path / "run") == losses(tmp_path / "whole" / "run")
    assert not any("preparing" in sentence for sentence in said)


def test_a_larger_budget_goes_on_from_the_end(tmp_path, text):
    run(config(tmp_path, text))
    result, _ = run(config(tmp_path, text, max_steps=8))
    assert (result.status, result.step) == ("finished", 8)
    assert len(losses(tmp_path / "run")) == 8


def test_what_decides_the_losses_may_not_change_between_parts_of_a_run(tmp_path, text):
    run(config(tmp_path, text), callbacks=[Stop(2)])
    wider = plain_config(tmp_path, text)
    wider["overrides"]["hidden_size"] = 64
    longer = plain_config(tmp_path, text)
    longer["data"]["seq_len"] = 48
    for changed, message in (
        (wider, r"model\.hidden_size was 32 .* is 64"),
        (longer, r"data\.seq_len was 24 .* is 48"),
    ):
        before = (tmp_path / "run" / "config.json").read_text()
        with pytest.raises(ConfigError, match=message):
            run(RunConfig.from_dict(changed))
        assert (tmp_path / "run" / "config.json").read_text() == before


def test_speed_and_reporting_may_change_between_parts_of_a_run(tmp_path, text):
    run(config(tmp_path, text), callbacks=[Stop(2)])
    changed = config(tmp_path, text, checkpoint_every=1, keep_checkpoints=1, eval_every=1)
    result, _ = run(replace(changed, tensorboard=True, num_threads=None))
    assert result.status == "finished"
    assert (tmp_path / "run" / "tensorboard").is_dir()
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path, text):
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(replace(config(tmp_path, text, max_steps=2), run_dir=str(tmp_path / name), seed=seed))
        found.append(losses(tmp_path / name))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_threads_give_the_same_bits_every_time(tmp_path, text, precision):
    for name in ("a", "b"):
        given = replace(
            config(tmp_path, text, max_steps=2, precision=precision), run_dir=str(tmp_path / name), num_threads=2
        )
        run(given)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_a_run_keeps_its_data_when_the_source_changes_or_goes(tmp_path, text):
    run(config(tmp_path, text), callbacks=[Stop(2)])
    text.unlink()
    assert run(config(tmp_path, text))[0].status == "finished"


def test_a_broken_checkpoint_is_passed_over(tmp_path, text):
    run(config(tmp_path, text, checkpoint_every=1), callbacks=[Stop(3)])
    (tmp_path / "run" / "checkpoints" / "step-00000003" / "model.safetensors").write_bytes(b"")
    result, said = run(config(tmp_path, text, checkpoint_every=1))
    assert result.status == "finished"
    assert sum("passing over a broken checkpoint" in sentence for sentence in said) == 1
    assert len(losses(tmp_path / "run")) == 6


def test_no_whole_checkpoint_is_an_error(tmp_path, text):
    run(config(tmp_path, text), callbacks=[Stop(3)])
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="delete them to start again"):
        run(config(tmp_path, text))


def test_a_directory_in_use_is_refused(tmp_path, text):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="in use by another process"):
            run(config(tmp_path, text))
    assert run(config(tmp_path, text))[0].status == "finished"


def test_text_without_held_out_documents_trains_without_evaluation(tmp_path):
    (tmp_path / "one.txt").write_text("a single document of a few words " * 20)
    result, said = run(config(tmp_path, tmp_path / "one.txt", eval_every=1))
    assert result.status == "finished"
    assert "bits_per_byte" not in result.metrics
    assert any("training without evaluation" in sentence for sentence in said)
    again, _ = run(config(tmp_path, tmp_path / "one.txt", max_steps=7))
    assert again.step == 7


def test_held_out_text_of_its_own(tmp_path, text):
    (tmp_path / "held_out.txt").write_text("peace and commerce")
    plain = plain_config(tmp_path, text)
    plain["data"]["validation"] = str(tmp_path / "held_out.txt")
    result, _ = run(RunConfig.from_dict(plain))
    assert "bits_per_byte" in result.metrics
    assert TokenShards(tmp_path / "run" / "data" / "validation").num_bytes == len("peace and commerce")
    assert TokenShards(tmp_path / "run" / "data" / "train").num_documents == 60


def test_a_given_tokenizer_decides_the_vocabulary(tmp_path, text):
    Tokenizer.train(["peace and commerce"] * 9, vocab_size=262).save(tmp_path / "own.json")
    plain = plain_config(tmp_path, text)
    plain["data"]["tokenizer"] = str(tmp_path / "own.json")
    run(RunConfig.from_dict(plain))
    embedding = load_file(tmp_path / "run" / "model" / "model.safetensors")["model.embed_tokens.weight"]
    assert embedding.shape == (262, 32)


def test_missing_text_is_one_sentence_and_a_later_run_works(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        run(config(tmp_path, tmp_path / "text.jsonl"))
    write_text(tmp_path)
    assert run(config(tmp_path, tmp_path / "text.jsonl"))[0].status == "finished"


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path, text):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        run(replace(config(tmp_path, text), run_dir=str(tmp_path / "file" / "run")))


def test_a_device_that_does_not_exist_is_one_sentence(tmp_path, text):
    with pytest.raises(ConfigError, match="device is 'abacus'"):
        run(replace(config(tmp_path, text), device="abacus"))


def test_the_configuration_survives_the_disk(tmp_path, text):
    original = config(tmp_path, text).resolved()
    run(original)
    read = RunConfig.from_dict(json.loads((tmp_path / "run" / "config.json").read_text()))
    assert read == original
    assert read.optim.betas == (0.9, 0.95)
    assert read.model["hidden_size"] == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trian": {}}, "did you mean 'train'"),
        ({"train": {"max_step": 3}}, "config.train: unknown key 'max_step': did you mean 'max_steps'"),
        ({"train": {"max_steps": "ten"}}, r"config.train.max_steps is 'ten', expected int \| None"),
        ({"train": {"max_steps": True}}, "config.train.max_steps is True"),
        ({"train": {"max_steps": 2.5}}, "config.train.max_steps is 2.5"),
        ({"train": 3}, "config.train is int"),
        ({"optim": {"betas": [0.9]}}, "config.optim.betas"),
        ({"optim": {"learning_rate": None}}, "config.optim.learning_rate is None, expected float"),
        ({"seed": "0"}, "config.seed is '0', expected int"),
        ({"model": "dmeo"}, "did you mean 'demo'"),
        ({"overrides": {"hiden_size": 3}}, "did you mean 'hidden_size'"),
    ],
)
def test_a_mistaken_configuration_is_one_sentence(tmp_path, text, change, message):
    plain = {**plain_config(tmp_path, text), **change}
    with pytest.raises(ConfigError, match=message):
        run(RunConfig.from_dict(plain))
    assert not (tmp_path / "run").exists()


def test_a_whole_number_serves_as_a_float(tmp_path, text):
    plain = plain_config(tmp_path, text, max_minutes=3)
    assert RunConfig.from_dict(plain).train.max_minutes == 3


def test_overrides_are_laid_over_nested_values(tmp_path, text):
    plain = plain_config(tmp_path, text)
    plain["overrides"]["blocks"] = {"kda": {"mixer": {"num_heads": 2}}}
    network = RunConfig.from_dict(plain).network()
    assert network.blocks["kda"].mixer.num_heads == 2
    assert network.blocks["kda_dense"].mixer.num_heads == 4


def test_fields_free_to_change_are_those_that_change_neither_network_nor_data(tmp_path, text):
    free = resumable_with(config(tmp_path, text))
    assert free >= {"run_dir", "num_threads", "train.max_steps", "evaluation.batches", "tensorboard"}
    assert not free & {"seed", "model", "overrides", "schedule.warmup", "optim.learning_rate"}
    assert not any(name.startswith("data.") for name in free)
    assert DataConfig().location == "sotu"
