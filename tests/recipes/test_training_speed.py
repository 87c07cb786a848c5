"""Training speed, measured on a run's own data and leaving the run as it was."""

import json
from pathlib import Path

import pytest

from kimi_linear.base.errors import KimiLinearError
from kimi_linear.recipes.demo import report, speed
from kimi_linear.recipes.train import DataConfig, RunConfig, train, training_speed
from kimi_linear.training.loop import TrainConfig


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one step of 64 tokens."""
    directory = tmp_path_factory.mktemp("speed")
    text = directory / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{n} to be or not to be " * 30}) + "\n" for n in range(40)))
    config = RunConfig(
        run_dir=str(directory / "run"),
        model="tiny",
        overrides={"vocab_size": 270, "hidden_size": 32},
        data=DataConfig(location=str(text), seq_len=32, batch_size=2),
        train=TrainConfig(max_steps=1, precision="fp32"),
        tensorboard=False,
    )
    train(config, report=lambda sentence: None)
    return directory / "run"


def files(directory: Path) -> dict[str, int]:
    return {str(p.relative_to(directory)): p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file()}


def test_whole_steps_are_counted_and_the_run_stays_as_it_was(run_dir: Path) -> None:
    before = {name: time for name, time in files(run_dir).items() if name != ".lock"}
    measured = training_speed(str(run_dir), 0.2)
    assert measured.tokens > 0
    assert measured.tokens % 64 == 0
    assert measured.seconds >= 0.2
    assert measured.precision == "fp32"
    assert {name: time for name, time in files(run_dir).items() if name != ".lock"} == before


def test_a_slow_machine_still_measures_one_step(run_dir: Path) -> None:
    measured = training_speed(str(run_dir), 1e-9, warm_up=1)
    assert measured.tokens == 64
    assert measured.seconds > 0


def test_both_sides_are_measured_where_there_are_kernels(run_dir: Path) -> None:
    compared = speed.compare(str(run_dir), 0.2)
    if "reason" in compared:
        assert "not compared" in report.speed_sentence(compared)
        return
    assert compared.keys() == {"native", "plain"}
    assert all(side["tokens"] > 0 for side in compared.values())
    assert f"{speed.ratio(compared):.1f} times as many tokens" in report.speed_sentence(compared)


def test_a_side_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "why_unavailable", lambda: None)
    with pytest.raises(KimiLinearError, match=r"level 'auto' failed[\s\S]*config\.json"):
        speed.compare(str(tmp_path), 1.0)


def test_the_ratio_is_of_rates() -> None:
    sides = {"native": {"tokens": 600, "seconds": 2.0}, "plain": {"tokens": 150, "seconds": 3.0}}
    assert speed.ratio(sides) == 6.0
