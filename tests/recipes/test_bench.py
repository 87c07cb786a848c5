"""`kimi-linear bench`: what it measures, what it writes down, and when it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kimi_linear.base.errors import BackendError, ConfigError
from kimi_linear.models.kimi_linear.presets import preset
from kimi_linear.recipes.bench import BenchConfig, bench, ceilings, context, memory, models, operators, run, selfcheck
from kimi_linear.recipes.bench.cases import Case, main_cases, make_inputs, sweep_cases
from kimi_linear.recipes.bench.engine import Engine, build, gqa_like, named_config, prompt
from kimi_linear.recipes.bench.machine import describe, slug
from kimi_linear.recipes.bench.record import Row, fraction, line, to_json
from kimi_linear.recipes.bench.timing import Effort, in_turns, spread, turn

INSTANT = Effort(rounds=2, turn_seconds=0.0, budget_seconds=60.0)


def test_flop_are_those_of_the_recurrence() -> None:
    forward, both = (Case(10, "float32", backward) for backward in (False, True))
    # 7 K V a token-head: 114,688 at K = V = 128.
    assert forward.flop == 10 * 8 * 114_688
    assert both.flop == 10 * 8 * 27 * 128 * 128


def test_the_comparison_covers_the_shape_that_is_aimed_at() -> None:
    full = main_cases(quick=False)
    for dtype in ("float32", "bfloat16"):
        for backward in (False, True):
            assert Case(4096, dtype, backward) in full
    assert {case.T for case in main_cases(quick=True)} == {512}
    sweep = sweep_cases(quick=False)
    assert not set(sweep) & set(full)
    assert {case.B for case in sweep} > {1}
    assert {case.H for case in sweep} > {1, 8}


def test_inputs_depend_on_the_seed_alone() -> None:
    case = Case(5, "float32", False, H=2, K=4, V=4)
    one, two, other = make_inputs(case), make_inputs(case), make_inputs(case, seed=1)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["q"], other["q"])
    assert (one["log_decay"] <= 0).all()


def test_turns_alternate_and_the_first_round_does_not_count() -> None:
    order: list[str] = []
    found = in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, Effort(2, 0.0, 9.0))
    assert order == ["a", "b"] * 3
    assert {name: len(times) for name, times in found.items()} == {"a": 2, "b": 2}


def test_one_call_that_uses_up_the_budget_is_the_measurement() -> None:
    calls: list[int] = []
    found = in_turns({"slow": lambda: calls.append(1)}, Effort(5, 0.0, -1.0))
    assert len(calls) == len(found["slow"]) == 1


def test_a_turn_lasts_as_long_as_it_should() -> None:
    calls: list[int] = []
    assert turn(lambda: calls.append(1), 0.01) > 0
    assert len(calls) > 1
    assert spread([4.0]).low == 4.0


def test_every_ceiling_is_a_rate() -> None:
    assert ceilings.gemm(torch.float32, 0.0, size=8) > 0
    memory = ceilings.Memory(2**17)
    assert memory.copy(0.0) > 0
    assert memory.read(0.0) > 0
    assert ceilings.better({"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 1.0}) == {"a": 3.0, "b": 2.0}
    assert ceilings.arithmetic({"gemm_float32": 5.0, "fma_float32": 9.0}, "float32") == ("fma_float32", 9.0)
    assert ceilings.arithmetic({}, "float32") is None


def test_a_packed_product_is_the_product() -> None:
    weight, x = torch.randn(16, 8), torch.randn(4, 8)
    packed = ceilings.packed_linear(weight, 4)
    if packed is not None:
        torch.testing.assert_close(packed(x), x @ weight.T)


def test_the_machine_says_what_it_is() -> None:
    about = describe()
    assert about["cores"] >= 1
    assert about["threads"] >= 1
    assert slug("AMD EPYC 9B45 (x) @ 3GHz", 2) == "amd-epyc-9b45-2-cores"


def test_a_row_says_which_part_of_its_ceiling_it_reached() -> None:
    row = Row("decode update", "kimi-linear:cpu", {"N": 1}, "GB/s", [20.0, 30.0, 40.0], 30.0, "copy_gigabytes")
    made = row.as_dict()
    assert (made["low"], made["median"], made["high"], made["turns"]) == (25.0, 30.0, 35.0, 3)
    assert fraction(made, {"copy_gigabytes": 60.0}) == 0.5
    assert fraction(made, {}) is None
    assert line(made, {"copy_gigabytes": 60.0}).endswith("30.000 GB/s   50 % of copy_gigabytes")
    row.ceiling_rate = 120.0
    assert fraction(row.as_dict(), {"copy_gigabytes": 60.0}) == 0.25
    missing = Row("decode", "kimi-linear", {}, "tokens/s", reason="no int4 weights").as_dict()
    assert "median" not in missing
    assert line(missing, {}).endswith("no int4 weights")


def test_a_record_has_a_line_a_row_and_survives() -> None:
    record = {"schema": 2, "rows": [Row("layer", "kimi-linear", {"tokens": n}, "us").as_dict() for n in (1, 2)]}
    assert json.loads(to_json(record)) == record
    assert [line.count("section") for line in to_json(record).splitlines() if "section" in line] == [1, 1]


def test_the_operators_agree_with_the_reference() -> None:
    assert selfcheck.problems() == []


def test_a_wrong_operator_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = selfcheck.call

    def wrong(inputs: list[torch.Tensor], backend: str) -> list[torch.Tensor]:
        o, *others = right(inputs, backend)
        return [o * (1.0 if backend == "reference" else 1.01), *others]

    monkeypatch.setattr(selfcheck, "call", wrong)
    found = list(selfcheck.differences("chunk", selfcheck.CASES[0]))
    assert found == ["chunk: o of T=200 float32 forward+backward is off by 1.0e-02, allowed 1.0e-05"]


def test_nothing_is_measured_with_wrong_operators(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run.selfcheck, "problems", lambda: ["chunk: o is off"])
    monkeypatch.setattr(run.ceilings, "measure", lambda _: pytest.fail("measured"))
    with pytest.raises(BackendError, match="nothing measured: the operators are wrong here"):
        bench(BenchConfig(output=str(tmp_path)), say=lambda _: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", [{"parts": ("dance",)}, {"threads": 0}, {"model": "tiny-gqu"}])
def test_a_bad_request_is_refused(given: dict[str, object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run.selfcheck, "problems", list)
    monkeypatch.setattr(run.ceilings, "measure", lambda _: {})
    with pytest.raises(ConfigError):
        bench(BenchConfig(output=str(tmp_path), **given), say=lambda _: None)  # type: ignore[arg-type]


def test_operator_rows_are_microseconds_of_a_token_head_on_a_core() -> None:
    case = Case(16, "float32", True, H=2, K=8, V=8)
    rows = operators.measure_case(case, INSTANT)
    assert "kimi-linear:chunk" in {row.engine for row in rows}
    assert "kimi-linear:reference" not in {row.engine for row in rows}
    row = operators.operator_row("x", case, [3.2e-5])
    assert row.values == [pytest.approx(torch.get_num_threads())]
    assert row.achieved == pytest.approx(1e-9 * case.flop / 3.2e-5)


def test_a_decode_step_advances_every_cold_state_once() -> None:
    pool = torch.zeros(6, 2, 4, 4)
    operators.cold_pass("delta_rule_decode", "reference", pool, 2)()
    assert (pool != 0).any(dim=(1, 2, 3)).all()
    rows = list(operators.decode_rows(INSTANT, H=2, K=8, cold_bytes=2**14))
    assert {(row.case["operator"], row.case["N"]) for row in rows} == {
        (name, N) for name in ("delta_rule_decode", "kda_core_decode") for N in operators.COLD_BATCHES
    }
    assert all(row.values or row.reason for row in rows)
    assert {"kimi-linear:chunk"} <= {row.engine for row in rows if row.values}


def test_the_gqa_baseline_differs_in_the_mixers_only() -> None:
    hybrid, full = preset("tiny"), gqa_like(preset("tiny"))
    assert {block.mixer.kind for block in full.layer_blocks} == {"gqa"}
    assert [block.ffn for block in full.layer_blocks] == [block.ffn for block in hybrid.layer_blocks]
    assert named_config("tiny-gqa") == full
    assert named_config("tiny-mla") == preset("tiny-mla")


def test_prompts_are_the_same_for_every_engine() -> None:
    assert prompt(4, 256).tolist() == [[0, 14, 28, 42]]
    assert prompt(600, 256).max() < 255


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_an_engine_reads_generates_and_says_what_it_cannot(weights: str) -> None:
    engine = Engine(build(preset("tiny")), weights)
    assert engine.prefill(8) > 0
    assert engine.decode(4, 2) > 0
    assert engine.logits(5).shape == (5, 256)
    assert engine.logits(5).dtype == torch.float32


def test_a_training_step_leaves_no_gradients() -> None:
    engine = Engine(build(preset("tiny")), None)
    assert engine.train(2, 16, "bf16") > 0
    assert all(parameter.grad is None for parameter in engine.model.parameters())


def test_work_is_counted_in_its_own_tokens() -> None:
    config = preset("tiny")
    assert models.rate_row(models.Work("decode", "bfloat16", 32, steps=8), "x", config, [2.0]).values == [4.0]
    row = models.rate_row(models.Work("training", "bfloat16", 64, batch=2), "x", config, [4.0])
    assert row.values == [32.0]
    assert row.achieved == pytest.approx(1e-9 * 3 * config.flops_per_token(32) * 32)
    assert (row.ceiling, row.case) == ("dot_bfloat16", {"arithmetic": "bfloat16", "batch": 2, "tokens": 64})
    assert {work.section for work in models.works(quick=True)} == {"prefill", "decode", "training"}


def test_one_layer_is_read_in_pieces() -> None:
    rows = list(models.measure_layer(preset("tiny"), "float32", [8, 20], INSTANT, piece=8))
    assert [row.case for row in rows] == [{"weights": "float32", "tokens": n, "piece": 8} for n in (8, 20)]
    assert all(row.median and row.median > 0 for row in rows)


def test_long_contexts_are_compared_on_filled_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(context.measure("tiny", [64], steps=2))
    assert [row.engine for row in rows] == ["tiny", "tiny-mla", "tiny-gqa"]
    assert all(len(row.values) == 2 for row in rows)
    sizes = [row.extra["cache_bytes"] for row in rows]
    assert sizes == [named_config(name).state_bytes(64, 2) for name in context.variants("tiny")]
    monkeypatch.setattr(context, "memory_bytes", lambda _: 1)
    assert next(context.measure("tiny", [64])).reason.startswith("needs 1.0 GiB")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_the_memory_of_a_step_is_measured_in_a_process_of_its_own() -> None:
    row = memory.measure("tiny", 64)
    assert row.reason == ""
    assert row.median is not None
    assert row.extra["weight_bytes"] == 4 * preset("tiny").parameters()
    assert "did you mean" in memory.measure("tinny", 64).reason


def test_a_quick_run_writes_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.ceilings, "measure", lambda _: {"fma_float32": 100.0, "read_gigabytes": 10.0})
    monkeypatch.setattr(run.selfcheck, "problems", list)
    quick: Callable[[str], Effort] = lambda _: INSTANT  # noqa: E731
    monkeypatch.setattr(run, "QUICK", quick(""))
    said: list[str] = []
    path = bench(BenchConfig(parts=("model",), model="tiny", quick=True, output=str(tmp_path)), say=said.append)
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["schema"] == 2
    assert record["quick"] is True
    assert record["model"] == "tiny"
    assert {row["section"] for row in record["rows"]} == {"prefill", "decode", "training", "layer"}
    assert len(said) == 1 + len(record["rows"]) + (record["machine"]["load"] > record["machine"]["cores"] / 2)


def test_the_command_measures_one_part_and_names_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from kimi_linear.cli.main import app

    monkeypatch.setattr(run.ceilings, "measure", lambda _: {})
    monkeypatch.setattr(run.selfcheck, "problems", list)
    done = CliRunner().invoke(app, ["bench", "context", "--quick", "--model", "tiny", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "tiny-mla" in done.output
    assert f"record: {next(tmp_path.glob('*.json'))}" in done.output
    assert CliRunner().invoke(app, ["bench", "dance"]).exit_code == 2
