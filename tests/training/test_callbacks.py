"""Metrics files hold each step once; progress is a bar on a terminal and lines elsewhere."""

import importlib.util
import io
import json
import sys
import time
from pathlib import Path

import pytest

from kimi_linear.base.errors import ConfigError, DataError
from kimi_linear.training.callbacks import (
    EvalRecord,
    FitResult,
    JsonlMetrics,
    Progress,
    StepRecord,
    TensorBoard,
    read_metrics,
)
from kimi_linear.training.callbacks.progress import clock
from training.toy import toy_trainer


def record(step, **fields):
    values = {"loss": 1 / step, "learning_rate": 0.1, "grad_norm": 1.0, "tokens": 8 * step, "tokens_per_second": 1234.5}
    values |= {"seconds": 2.0 * step, "progress": step / 10, "seconds_left": 185.0}
    return StepRecord(step=step, **{**values, **fields})


END = FitResult(status="finished", step=10, tokens=12345, seconds=3700.0, metrics={})


def write(path, start, steps, evaluations=()):
    metrics = JsonlMetrics(path)
    metrics.on_start(start)
    for step in steps:
        metrics.on_step(record(step))
        if step in evaluations:
            metrics.on_eval(EvalRecord(step=step, metrics={"bits_per_byte": 2.0}))
    metrics.on_end(END)


def kinds(path):
    return [(entry["kind"], entry["step"]) for entry in read_metrics(path)]


def test_a_line_holds_the_whole_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 0, [3], evaluations=[3])
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first == {"kind": "step", "step": 3, "loss": 1 / 3, "learning_rate": 0.1, "grad_norm": 1.0, "tokens": 24,
                     "tokens_per_second": 1234.5, "seconds": 6.0, "progress": 0.3, "seconds_left": 185.0}  # fmt: skip
    assert second == {"kind": "eval", "step": 3, "bits_per_byte": 2.0}


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 0, [1, 2, 3, 4], evaluations=[2, 4])
    write(path, 2, [3, 4, 5])
    assert kinds(path) == [("step", 1), ("step", 2), ("eval", 2), ("step", 3), ("step", 4), ("step", 5)]


@pytest.mark.parametrize("tail", ['{"kind": "step", "st', '{"kind": "step", "step": 2}', "\0\0\0", "\0\n[1]\n{}\n"])
def test_what_a_kill_left_unreadable_is_dropped(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    write(path, 0, [1, 2])
    with path.open("a") as file:
        file.write(tail)
    assert kinds(path) == [("step", 1), ("step", 2)]
    write(path, 2, [3])
    assert kinds(path) == [("step", 1), ("step", 2), ("step", 3)]


def test_a_new_run_starts_a_new_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 0, [1, 2])
    write(path, 0, [1])
    assert kinds(path) == [("step", 1)]


def test_lines_are_on_disk_as_soon_as_they_are_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = JsonlMetrics(path)
    metrics.on_start(0)
    metrics.on_step(record(1))
    assert kinds(path) == [("step", 1)]
    metrics.on_end(END)


def test_a_full_disk_is_one_sentence(tmp_path):
    metrics = JsonlMetrics(tmp_path / "metrics.jsonl")
    metrics.on_start(0)
    metrics._file.close()
    with Path("/dev/full").open("a", buffering=1) as metrics._file:
        with pytest.raises(DataError, match=r"metrics\.jsonl cannot be written: the disk is full; free space"):
            metrics.on_step(record(1))
        metrics.on_end(END)


def test_no_file_means_no_metrics(tmp_path):
    assert read_metrics(tmp_path / "missing.jsonl") == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_now_and_then_a_line_where_there_is_no_terminal(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    progress = Progress(stream, every_seconds=30)
    progress.on_start(0)
    for step in range(1, 8):
        progress.on_step(record(step))
        now[0] += 11.0
    progress.on_eval(EvalRecord(step=7, metrics={"bits_per_byte": 2.0}))
    progress.on_end(END)
    assert stream.getvalue().splitlines() == [
        " 10%  step 1  loss 1.000  1,234 tok/s  3:05 left",
        " 40%  step 4  loss 0.250  1,234 tok/s  3:05 left",
        " 70%  step 7  loss 0.143  1,234 tok/s  3:05 left",
        "step 7: bits per byte 2.0000",
        "finished at step 10: 12,345 tokens in 1:01:40",
    ]


def test_progress_is_a_bar_on_a_terminal():
    stream = Terminal()
    progress = Progress(stream)
    progress.on_start(0)
    progress.on_step(record(5))
    progress.on_eval(EvalRecord(step=5, metrics={"bits_per_byte": 2.0}))
    progress.on_end(END)
    shown = stream.getvalue()
    assert " 50%|" in shown
    assert "step 5  loss 0.200  1,234 tok/s  3:05 left" in shown
    assert "step 5: bits per byte 2.0000\n" in shown
    assert shown.endswith("finished at step 10: 12,345 tokens in 1:01:40\n")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (185, "3:05"), (3599, "59:59"), (7322, "2:02:02")]
)
def test_durations_read_like_a_clock(seconds, text):
    assert clock(seconds) == text


def scalars(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.skipif(not TensorBoard.is_installed(), reason="tensorboard is not installed")
def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    for start, steps in ((0, [1, 2, 3]), (2, [3, 4])):
        board = TensorBoard(tmp_path)
        board.on_start(start)
        for step in steps:
            board.on_step(record(step))
        board.on_eval(EvalRecord(step=steps[-1], metrics={"bits_per_byte": 2.5}))
        board.on_end(END)
    found = scalars(tmp_path)
    assert found["train/loss"] == [(step, pytest.approx(1 / step)) for step in (1, 2, 3, 4)]
    assert found["eval/bits_per_byte"] == [(4, 2.5)]
    assert found.keys() >= {"train/learning_rate", "train/grad_norm", "train/tokens_per_second"}


def test_without_tensorboard_it_is_refused_with_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        TensorBoard(tmp_path)


def test_importing_the_callbacks_does_not_import_tensorboard():
    import subprocess

    code = "import sys, kimi_linear.training.callbacks; sys.exit('tensorboard' in sys.modules)"
    subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"], check=True)


def test_a_failed_run_closes_its_files(tmp_path):
    class Broken:
        def state(self):
            return {}

        def __next__(self):
            raise OSError("the shard is gone")

    metrics, stream = JsonlMetrics(tmp_path / "metrics.jsonl"), io.StringIO()
    with pytest.raises(OSError, match="the shard is gone"):
        toy_trainer(batches=Broken(), callbacks=[metrics, Progress(stream)]).fit()
    assert metrics._file is None
    assert stream.getvalue().startswith("failed at step 0")
