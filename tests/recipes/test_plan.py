"""What serving takes, against figures computed by hand from the released configuration."""

import dataclasses
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kimi_linear.base.errors import ConfigError
from kimi_linear.causal_lm import KimiLinearForCausalLM
from kimi_linear.checkpoint.gguf.export import export_gguf
from kimi_linear.cli.main import app
from kimi_linear.models.kimi_linear.presets import preset
from kimi_linear.recipes.plan import make_plan, named_config, parse_count, table

MILLION = 1048576
# Of one sequence in the released model: 20 layers of a float32 state of 32 x 128 x 128 and three tails of 3 x 4,096.
STATE = 20 * (4 * 32 * 128 * 128 + 2 * 3 * 3 * 4096)


def test_the_released_model_at_a_million_tokens() -> None:
    plan = make_plan(preset("48b-a3b"), MILLION, 8)
    ours, latent, full = plan.caches
    assert ours.sequence == STATE + 7 * MILLION * 576 * 2
    assert ours.token == 7 * 576 * 2
    assert (latent.sequence, latent.token) == (27 * MILLION * 576 * 2, 27 * 576 * 2)
    assert full.token == 27 * 32 * (192 + 128) * 2
    assert plan.weights == 2 * 49_122_681_728
    assert plan.total == plan.weights + 8 * ours.sequence
    assert plan.step_seconds(1e9) == pytest.approx(1e-9 * (plan.active_weights + 8 * ours.sequence))
    assert plan.step_seconds(1e9, full) > plan.step_seconds(1e9, latent) > plan.step_seconds(1e9)


def test_states_stay_float32_whatever_the_dtype() -> None:
    narrow, wide = (make_plan(preset("tiny"), 1, 1, dtype).caches[0].sequence for dtype in ("bfloat16", "float32"))
    assert narrow < wide < 2 * narrow


def test_a_model_without_latent_attention_stands_alone() -> None:
    tiny = preset("tiny")
    blocks = {name: block for name, block in tiny.blocks.items() if name.startswith("kda")}
    only = dataclasses.replace(tiny, blocks=blocks, layers=("kda_dense", "kda"))
    assert [(cache.name, cache.token) for cache in make_plan(only, 64, 1).caches] == [("this model", 0)]


@pytest.mark.parametrize(("text", "count"), [("4096", 4096), ("128K", 131072), (" 1m ", MILLION)])
def test_counts(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5k", "1G", "k"])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected digits above 0"):
        parse_count(text)


@pytest.mark.parametrize(("context", "batch", "dtype"), [(0, 1, "bfloat16"), (1, 0, "bfloat16"), (1, 1, "int3")])
def test_impossible_plans_are_refused(context: int, batch: int, dtype: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        make_plan(preset("tiny"), context, batch, dtype)


def test_a_checkpoint_and_its_preset_plan_alike(tmp_path) -> None:
    KimiLinearForCausalLM(preset("tiny")).save_pretrained(tmp_path / "model")
    assert make_plan(named_config(str(tmp_path / "model")), 64, 2) == make_plan(preset("tiny"), 64, 2)
    with pytest.raises(ConfigError, match="tiny"):
        named_config("tinny")


def test_the_table_holds_the_figures() -> None:
    text = "\n".join(table(make_plan(preset("48b-a3b"), MILLION, 8), 50e9))
    for figure in ("91.50 GiB", "7.92 GiB", "30.38 GiB", "8,064 B", "63.32 GiB", "50.0 GB/s"):
        assert figure in text, figure


def test_the_command() -> None:
    done = CliRunner().invoke(app, ["plan", "48b-a3b", "--context", "1M", "--batch", "8", "--bandwidth", "50"])
    assert done.exit_code == 0
    assert done.stdout.splitlines() == table(make_plan(preset("48b-a3b"), MILLION, 8), 50e9)
    measured = CliRunner().invoke(app, ["plan", "tiny"])
    assert "GB/s." in measured.stdout


def test_a_gguf_file_is_planned_like_the_model_it_is(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed: pip install 'kimi-linear[gguf]'")
    KimiLinearForCausalLM(preset("tiny")).save_pretrained(tmp_path / "model")
    export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    found = make_plan(named_config(str(tmp_path / "model.gguf")), 4096, 2)
    expected = make_plan(preset("tiny"), 4096, 2)
    assert (found.caches, found.weights) == (expected.caches, expected.weights)
