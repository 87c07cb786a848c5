"""Killed with SIGKILL at random moments and run again, a run ends exactly like one that was never broken."""

import json
import os
import random
import signal
import subprocess
import sys
import time

from kimi_linear.training.callbacks import read_metrics
from training.runs import plain_config, write_text

STEPS = 42
RUN = """
import json, sys
from pathlib import Path
from kimi_linear.recipes.train import RunConfig, train
train(RunConfig.from_dict(json.loads(Path(sys.argv[1]).read_text())))
"""
# What a clock decides, and so differs between any two runs.
TIMES = {"seconds", "seconds_left", "tokens_per_second"}


def start(directory, text):
    plain = plain_config(directory, text, max_steps=STEPS, checkpoint_every=3, eval_every=7, accumulation=2)
    (directory / "given.json").write_text(json.dumps(plain))
    code = f"import sys; sys.path[:0] = {sys.path!r}\n{RUN}"
    return subprocess.Popen(
        [sys.executable, "-c", code, str(directory / "given.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def entries(directory):
    return read_metrics(directory / "run" / "metrics.jsonl")


def wait_for_step(process, directory, step):
    deadline = time.monotonic() + 300
    while not any(entry["step"] >= step for entry in entries(directory)):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_run_killed_three_times_ends_like_an_unbroken_one(tmp_path):
    text = write_text(tmp_path)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    unbroken = start(whole, text)
    generator = random.Random()
    for earliest in (4, 14, 24):
        process = start(broken, text)
        wait_for_step(process, broken, earliest + generator.randrange(8))
        # Anywhere within a step, an evaluation or the writing of a checkpoint.
        time.sleep(generator.uniform(0.0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (broken / "run" / "result.json").exists()
    finish(start(broken, text))
    finish(unbroken)

    without_times = [
        [{key: value for key, value in entry.items() if key not in TIMES} for entry in entries(directory)]
        for directory in (whole, broken)
    ]
    assert without_times[0] == without_times[1]
    assert [entry["step"] for entry in entries(broken) if entry["kind"] == "step"] == list(range(1, STEPS + 1))
    results = [json.loads((directory / "run" / "result.json").read_text()) for directory in (whole, broken)]
    assert results[0]["metrics"] == results[1]["metrics"]
    weights = [(directory / "run" / "model" / "model.safetensors").read_bytes() for directory in (whole, broken)]
    assert weights[0] == weights[1]
