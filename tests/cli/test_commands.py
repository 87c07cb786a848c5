"""The command line end to end at toy size; in a process of its own only where that matters."""

import contextlib
import io
import json
import os
import subprocess
import sys
import unittest.mock
from pathlib import Path

import pytest

from kimi_linear.cli.main import main

TEXT = "the quick brown fox jumps over the lazy dog while the band plays on.\n"
SMALL = ["--model", "tiny", "--seq-len", "32", "--batch-size", "2", "--precision", "fp32", "--vocab-size", "260"]


def run_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kimi_linear.cli.main", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run `main` in this process as the shell would: arguments, streams, exit code."""
    out, err = io.StringIO(), io.StringIO()
    patched = unittest.mock.patch.multiple(sys, argv=["kimi-linear", *arguments], stdin=io.StringIO(stdin))
    with patched, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as exit:
        main()
    return subprocess.CompletedProcess(arguments, int(exit.value.code or 0), out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps on a few hundred lines of text."""
    directory = tmp_path_factory.mktemp("run")
    data = directory / "text.jsonl"
    data.write_text("".join(json.dumps({"text": f"{n} {TEXT * 5}"}) + "\n" for n in range(60)))
    done = run_process("train", "--run-dir", str(directory / "run"), "--data", str(data), "--max-steps", "4", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "finished: 4 steps" in done.stdout
    return directory / "run"


def test_train_leaves_model_metrics_and_result(trained: Path) -> None:
    assert json.loads((trained / "result.json").read_text())["step"] == 4
    steps = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in steps if entry["kind"] == "step"] == [1, 2, 3, 4]
    assert (trained / "model" / "tokenizer.json").exists()


def test_generate_continues_a_prompt_and_the_seed_decides(trained: Path) -> None:
    call = ["generate", str(trained / "model"), "--prompt", "the quick", "--max-new-tokens", "12", "--seed", "3"]
    first, second = run(*call), run(*call)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("the quick")
    assert len(first.stdout) > len("the quick\n")
    assert first.stdout == second.stdout


def test_generate_reads_standard_input(trained: Path) -> None:
    done = run("generate", str(trained / "model"), "--max-new-tokens", "2", stdin="the lazy")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the lazy")


def test_printed_configuration_is_one_that_train_reads(tmp_path: Path) -> None:
    shown = run("train", "--run-dir", str(tmp_path / "a"), "--max-steps", "1", *SMALL, "--print-config")
    assert shown.returncode == 0, shown.stderr
    config = tmp_path / "config.json"
    config.write_text(shown.stdout)
    again = run("train", "--config", str(config), "--print-config")
    assert json.loads(again.stdout) == json.loads(shown.stdout)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "--model", "tinny", "--max-steps", "1"], "did you mean 'tiny'"),
        (["train", "--data", "/nowhere.txt", "--max-steps", "1"], "/nowhere.txt"),
        (["train", "--config", "/nowhere.json"], "/nowhere.json does not exist"),
        (["train"], "--max-steps and --max-minutes are both missing"),
        (["train", "--max-steps", "1", "--optimizer", "sgd"], "unknown optimizer 'sgd'"),
        (["train", "--max-steps", "soon"], "--max-steps"),
        (["generate", "/nowhere", "--prompt", "x"], "/nowhere"),
        (["generate", "/nowhere", "--prompt", ""], "the prompt is empty"),
        (["demo", "--minutes", "0"], "--minutes is 0"),
        (["sing"], "sing"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    extra = ["--run-dir", str(tmp_path / "run")] if arguments[0] == "train" else []
    done = run(*arguments, *extra)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_unreadable_text_is_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff\xfe\x00 not text")
    done = run("train", "--data", str(bad), "--max-steps", "1", "--run-dir", str(tmp_path / "run"), *SMALL)
    assert done.returncode == 2
    assert str(bad) in done.stderr


def test_unknown_key_in_a_configuration_names_the_nearest(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"run_dir": str(tmp_path / "run"), "train": {"max_step": 1}}))
    done = run("train", "--config", str(config), "--max-steps", "1")
    assert done.returncode == 2
    assert "did you mean 'max_steps'" in done.stderr


def test_debug_shows_the_traceback() -> None:
    done = run_process("--debug", "train", "--model", "tinny", "--max-steps", "1")
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_truncated_checkpoint_is_refused(trained: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in (trained / "model").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = run("generate", str(model), "--prompt", "the")
    assert done.returncode == 2
    assert "model.safetensors" in done.stderr
    assert "Traceback" not in done.stderr


def test_export_writes_every_format(trained: Path, tmp_path: Path) -> None:
    model = str(trained / "model")
    done = run("export", model, str(tmp_path / "model.gguf"), "--type", "q8_0")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'model.gguf'}: ")
    assert lines[0].endswith("q8_0")
    assert "rows of no whole blocks and stay f32" in lines[1]
    assert len(lines) == 2
    for format in ("mlx", "release"):
        done = run("export", model, str(tmp_path / format), "--format", format, "--type", "bf16")
        assert done.returncode == 0, done.stderr
        assert "bytes in 1 files of tensors" in done.stdout
        assert (tmp_path / format / "tokenizer.json").is_file()
    given = ["--prompt", "the quick", "--max-new-tokens", "4", "--seed", "3", "--dtype", "float32"]
    assert (
        run("generate", str(tmp_path / "mlx"), *given).stdout
        == run("generate", str(tmp_path / "release"), *given).stdout
    )


def test_export_refuses_what_it_does_not_know(trained: Path, tmp_path: Path) -> None:
    model, target = str(trained / "model"), str(tmp_path / "out")
    for options, sentence in (
        (["--format", "onnx"], "gguf, mlx, release"),
        (["--format", "mlx", "--type", "q8_0"], "type is 'q8_0', expected f32 or bf16"),
        (["--type", "q9"], "q4_0"),
    ):
        done = run("export", model, target, *options)
        assert (done.returncode, done.stdout) == (2, "")
        assert sentence in done.stderr
    assert list(tmp_path.iterdir()) == []
