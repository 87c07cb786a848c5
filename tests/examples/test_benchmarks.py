"""The benchmarks measure what they say, refuse on a red test, and their page comes from their records."""

import argparse
import importlib
import json
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from kimi_linear.models.kimi_linear.presets import preset
from kimi_linear.recipes.bench import models
from kimi_linear.recipes.bench.cases import Case
from kimi_linear.recipes.bench.engine import prompt
from kimi_linear.recipes.bench.operators import operator_row
from kimi_linear.recipes.bench.record import SCHEMA, Row, save, to_json
from support.source_tree import ROOT

FOLDER = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    """The benchmark scripts as modules; they find each other in their own folder, as when run."""
    names = [path.stem for path in FOLDER.glob("*.py")]
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(FOLDER))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def inputs(bench: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A toy case and the folder of its inputs."""
    case = Case(70, "float32", backward=True, H=2, K=8, V=4)
    folder = tmp_path_factory.mktemp("inputs")
    bench["cases"].write_inputs(case, folder)
    return case, folder


def reference_worker(bench: dict[str, ModuleType], keep: bool = False) -> Any:
    given = {"implementation": "kimi-linear:reference", "threads": 1}
    return bench["processes"].Worker("worker.py", given, keep=keep)


def test_a_worker_runs_what_it_was_started_for(bench: dict[str, ModuleType], inputs: tuple[Any, Path]) -> None:
    case, folder = inputs
    settings = bench["operators"].QUICK
    with reference_worker(bench, keep=True) as worker:
        bench["operators"].load(worker, case, folder, settings)
        times = worker.ask(60, do="time", min_seconds=0.0)
        memory = worker.ask(60, do="memory")
        with pytest.raises(bench["processes"].WorkerError, match="unknown command 'dance'"):
            worker.ask(60, do="dance")
    assert len(times) == 1
    assert times[0] > 0
    allocated, outputs = memory["allocated"]
    elements = case.token_heads
    # o and four gradients with a channel axis, the gradient of beta, and the state, all float32.
    assert outputs == 4 * (elements * (2 * case.V + 3 * case.K + 1) + case.H * case.K * case.V)
    assert allocated > outputs


def test_a_worker_that_cannot_start_says_why(bench: dict[str, ModuleType]) -> None:
    with pytest.raises(bench["processes"].WorkerError, match="KeyError: 'no-such-package'"):
        bench["processes"].Worker("worker.py", {"implementation": "no-such-package"}, keep=False).__enter__()


def test_a_worker_out_of_time_is_stopped(bench: dict[str, ModuleType], inputs: tuple[Any, Path]) -> None:
    case, folder = inputs
    with reference_worker(bench) as worker:
        bench["operators"].load(worker, case, folder, bench["operators"].QUICK)
        with pytest.raises(bench["processes"].WorkerError, match="stopped after 0 s"):
            worker.ask(0.0, do="time", min_seconds=60.0)
        with pytest.raises(bench["processes"].WorkerError, match="its process ended"):
            worker.ask(60, do="time", min_seconds=0.0)


class Allocating:
    """A call whose memory is known: 3000 floats live at most, 1000 of them its output."""

    def __call__(self) -> list[torch.Tensor]:
        x = torch.ones(1000)
        y = x + 1
        z = torch.cat([x, y])[:1000].clone()
        del x, y
        return [z]


def test_the_allocated_peak_is_exact(bench: dict[str, ModuleType]) -> None:
    peak, outputs = bench["worker"].allocated_peak(Allocating())
    # x, y, their concatenation (2000) and its copy.
    assert (peak, outputs) == (5000 * 4, 1000 * 4)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_the_resident_peak_sees_what_torch_does_not_allocate(bench: dict[str, ModuleType]) -> None:
    def call() -> list[torch.Tensor]:
        # Straight from the system: an allocator may have kept as much from before.
        outside = mmap.mmap(-1, 64 * 2**20)
        for page in range(0, len(outside), 4096):
            outside[page] = 1
        return []

    peak, outputs = bench["worker"].resident_peak(call)
    assert outputs == 0
    assert peak > 60 * 2**20
    assert bench["worker"].allocated_peak(call)[0] == 0


def test_missing_peers_become_rows_with_the_reason(bench: dict[str, ModuleType], inputs: tuple[Any, Path]) -> None:
    operators, case = bench["operators"], Case(8, "float32", backward=False, H=1, K=4, V=4)
    with operators.Workers(bench["peers"].Peers(None, "no network")) as workers:
        turns = operators.CaseTurns(case, workers, operators.QUICK)
        for peer in operators.PEERS:
            turns.begin(peer, inputs[1])
    reasons = {row.engine: row.reason for row in turns.rows()}
    assert {reasons[peer] for peer in operators.PEERS} == {"not installed: no network"}
    assert {"kimi-linear:chunk", "kimi-linear:reference"} <= reasons.keys()


def test_a_missing_engine_is_a_row_with_the_reason(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    engines, absent = bench["engines"], bench["peers"].Peers(None, "no network", "no network")
    written = engines.write_models("tiny", tmp_path, ())
    assert (written.checkpoint / "config.json").exists()
    assert engines.disagreements(written, absent, tokens=8)[0] == []
    row = engines.training_memory(written, absent, 64)
    assert row.reason == "not installed: no network"


def test_our_engine_does_its_work_in_a_process(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    engines, absent = bench["engines"], bench["peers"].Peers(None, "no network", "no network")
    written = engines.write_models("tiny", tmp_path, ())
    with engines.start("kimi-linear", written, "float32", absent) as worker:
        for work in (models.Work("prefill", "float32", 8), models.Work("decode", "float32", 4, steps=2)):
            assert worker.ask(60, **engines.request(work)) > 0
    ours = engines.logits_of("kimi-linear", written, absent, tmp_path, 6)
    assert engines.agreement("transformers", ours, ours) == {
        "relative_error": 0.0,
        "same_first_choice": 1.0,
        "positions": 6.0,
    }


def test_what_takes_minutes_is_given_less_and_says_so(bench: dict[str, ModuleType]) -> None:
    engines = bench["engines"]
    work = models.Work("training", "bfloat16", 1024, batch=4)
    assert engines.own_work("kimi-linear", work, engines.FULL) == work
    less = engines.own_work("transformers", work, engines.FULL)
    assert (less.batch, less.tokens) == (1, engines.FULL.slow_training)
    assert engines.engines_of(work) == ["kimi-linear", "transformers"]
    assert "transformers" not in engines.engines_of(models.Work("decode", "int4", 32, steps=8))


def test_logits_that_differ_are_a_sentence(
    bench: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = bench["engines"]
    ours = np.random.default_rng(0).normal(size=(4, 9))

    def logits(engine: str, *_: Any) -> np.ndarray:
        if engine == "xllamacpp":
            best = ours[-1].argsort()[:-6:-1]
            return np.stack([best, engines.log_softmax(ours[-1])[best]], axis=1)
        return ours * (1.01 if engine == "llama.cpp" else 1.0)

    monkeypatch.setattr(engines, "logits_of", logits)
    sentences, found = engines.disagreements(None, None)
    assert sentences == ["llama.cpp and kimi-linear differ in the logits by 1.0e-02, allowed 1e-03"]
    assert found["xllamacpp"]["relative_error"] < 1e-12
    assert found["transformers"]["same_first_choice"] == 1.0


def test_the_engines_read_the_same_prompt(bench: dict[str, ModuleType]) -> None:
    assert bench["engine_worker"].prompt(300, 256) == prompt(300, 256)[0].tolist()


def test_peers_that_cannot_be_installed_are_one_sentence(
    bench: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("not a requirement\n")
    monkeypatch.setattr(bench["peers"], "REQUIREMENTS", requirements)
    found = bench["peers"].ensure(tmp_path / "environment")
    assert found.python is None
    assert found.reason.startswith("requirements.txt cannot be installed: ERROR")
    assert "\n" not in found.reason


def test_peers_that_stand_as_pinned_are_left_alone(
    bench: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = tmp_path / "environment"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").touch()
    installed: list[Path] = []
    monkeypatch.setattr(bench["peers"], "_install", lambda environment, python: installed.append(environment))
    for _ in range(2):
        assert bench["peers"].ensure(environment).python == environment / "bin" / "python"
    assert installed == [environment]


def full_record(engine_share: float = 1.0) -> dict[str, Any]:
    """A made-up record in which every aim can be judged; `engine_share` scales our rates."""
    threads = torch.get_num_threads()
    rows = []
    for dtype, backward, us in (
        ("float32", False, 0.7),
        ("float32", True, 3.3),
        ("bfloat16", False, 0.5),
        ("bfloat16", True, 2.6),
    ):
        for engine, factor in (("kimi-linear:cpu", 1 / engine_share), ("kimi-linear:chunk", 5.0), ("fla", 30.0)):
            case = Case(4096, dtype, backward)
            rows.append(operator_row(engine, case, [us * factor * 1e-6 * case.token_heads / threads], "1.2"))
    rows[0].extra["memory"] = {"allocated_per_channel": 12.34, "resident_per_channel": None}
    rows.append(operator_row("attn-gym", Case(4096, "float32", False), [], reason="stopped after 60 s"))
    cold = {"operator": "kda_core_decode", "N": 16, "heads": 8, "K": 128}
    rows.append(Row("decode update", "kimi-linear:cpu", cold, "GB/s", [54.0], 54.0, "copy_gigabytes"))
    rates = {"kimi-linear": 400.0 * engine_share, "llama.cpp": 100.0, "xllamacpp": 50.0, "transformers": 8.0}
    config = preset("300m")
    for work in models.works(quick=False):
        for engine, rate in rates.items():
            rows.append(models.rate_row(work, engine, config, [work.counted / rate]))
    for tokens, us in ((1024, 10.5), (4096, 10.0), (262144, 10.2)):
        for weights in ("bfloat16", "float32"):
            case = {"weights": weights, "tokens": tokens, "piece": min(tokens, 4096)}
            rows.append(Row("layer", "kimi-linear", case, "us per token", [us]))
    for engine, ms in (("300m", 40.0), ("300m-mla", 160.0), ("300m-gqa", 150.0)):
        extra = {"cache_bytes": 2**30}
        rows.append(
            Row("context", engine, {"context": 1048576}, "ms per token", [ms], 30.0, "read_gigabytes", extra=extra)
        )
    step = {"tokens": 8192, "arithmetic": "fp32", "recompute": False}
    rows.append(Row("memory", "kimi-linear", step, "GiB", [1.5]))
    rows.append(Row("memory", "kimi-linear", {**step, "recompute": True}, "GiB", [0.5]))
    rows.append(Row("memory", "transformers", step, "GiB", reason="out of memory", extra={"more_than_gib": 16.0}))
    machine = {"machine": "toy-2-cores", "cpu": "Toy", "flags": ["avx2"], "cores": 2, "threads": 2, "load": 0.1}
    machine |= {"system": "Linux x86_64", "python": "3.11.0", "torch": "2.13.0", "commit": "abc", "native": "avx2"}
    ceilings = {"fma_float32": 480.0, "dot_bfloat16": 960.0, "copy_gigabytes": 60.0, "read_gigabytes": 70.0}
    agreement = {
        "operators": {"fla": {"o": 1e-7, "d_q": 2e-6}},
        "logits": {
            "transformers": {"relative_error": 3e-6, "same_first_choice": 1.0, "positions": 48.0},
            "llama.cpp": {"reason": "not installed: no compiler"},
        },
    }
    return {
        "schema": SCHEMA,
        "date": "2026-01-01 00:00 UTC",
        "quick": False,
        "model": "300m",
        "parameters": config.parameters(),
        "agreement": agreement,
        "machine": machine,
        "ceilings": ceilings,
        "rows": [row.as_dict() for row in rows],
    }


def test_every_aim_is_judged_from_the_record(bench: dict[str, ModuleType]) -> None:
    found = bench["aims"].verdicts(full_record())
    assert len(found) == 15
    # Equal to the aim counts as reached, rounding aside.
    assert all(verdict.ratio is not None and verdict.ratio > 0.999 for verdict in found)
    by_name = {(verdict.what, verdict.aim): verdict for verdict in found}
    assert found[0].reached == "0.70 us"
    prefill = by_name["297M model, prefill 4096, bfloat16", ">= 4x llama.cpp bfloat16"]
    assert prefill.reached == "4.00x (400 and 100 tokens/s)"
    training = by_name["297M model, training forward + backward, batch x 1024 tokens", ">= 50x transformers"]
    assert training.mark == "1.00 reached"
    assert by_name["KDA layer prefill, cost of a token, 1k to 256k", "flat within 10 %"].reached == "within 5 %"
    assert found[-1].mark == "at least 1.60, reached"


def test_a_slower_engine_misses_its_aims(bench: dict[str, ModuleType]) -> None:
    found = bench["aims"].verdicts(full_record(engine_share=0.5))
    missed = [verdict for verdict in found if verdict.ratio is not None and verdict.ratio < 1]
    assert len(missed) == 8
    assert missed[0].mark == "0.54 missed"


def test_an_aim_without_figures_says_so(bench: dict[str, ModuleType]) -> None:
    found = bench["aims"].verdicts({**full_record(), "rows": []})
    assert len(found) == 15
    assert all(verdict.ratio is None and "not measured" in verdict.reached for verdict in found)
    assert {verdict.mark for verdict in found} == {"-"}


def test_the_page_begins_with_the_aims_and_holds_the_numbers_of_the_record(bench: dict[str, ModuleType]) -> None:
    text = bench["report"].render([full_record()], "results")
    assert text.index("reached / aim") < text.index("### Ceilings")
    assert "| KDA forward, float32 inputs, T=4096, H=8, K=V=128 | <= 0.75 us | 0.70 us | 1.07 reached |" in text
    assert "| forward | float32 | 1 | 4096 | 8 | kimi-linear cpu 1.2 | 0.7 |" in text
    assert "| forward | float32 | 1 | 4096 | 8 | attn-gym | stopped after 60 s |" in text
    assert "| forward | 4096 | kimi-linear cpu 1.2 | 12.3 | - |" in text
    assert "| kda_core_decode | 16 | 8 | 128 | kimi-linear cpu | 54 |  | 90 % of copy gigabytes |" in text
    assert "| transformers | logits | 3.0e-06 | 100 % of 48 first choices the same |" in text
    assert "| llama.cpp | logits | - | not installed: no compiler |" in text
    assert "| 8192 | fp32 | False | transformers | out of memory |" in text
    for picture in bench["plots"].PICTURES:
        assert f"(results/toy-2-cores-{picture}.png)" in text
    # No row of a table is broken by a cell.
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def test_a_page_without_records_says_what_to_do(bench: dict[str, ModuleType]) -> None:
    assert bench["report"].render([], "results").endswith("run `make bench`.\n")


def test_the_newest_record_of_a_machine_is_shown_with_its_plots(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    save(full_record(), tmp_path / "z-old.json")
    save({**full_record(), "date": "2026-02-01 00:00 UTC"}, tmp_path / "a-new.json")
    (tmp_path / "older-schema.json").write_text(json.dumps({"machine": {"machine": "x"}, "date": "2027"}))
    bench["report"].write(tmp_path, tmp_path / "RESULTS.md")
    text = (tmp_path / "RESULTS.md").read_text()
    assert "2026-02-01" in text
    assert "2026-01-01" not in text
    for picture in bench["plots"].PICTURES:
        assert (tmp_path / f"toy-2-cores-{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_a_partial_record_makes_a_page_too(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    record = full_record()
    record["rows"] = [row for row in record["rows"] if row["section"] == "context"]
    save(record, tmp_path / "a.json")
    bench["report"].write(tmp_path, tmp_path / "RESULTS.md")
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert "toy-2-cores-context.png" in drawn
    text = (tmp_path / "RESULTS.md").read_text()
    assert all(name in text for name in drawn)
    assert text.count("](./toy-2-cores") == len(drawn)


def test_a_record_survives_json() -> None:
    assert json.loads(to_json(full_record())) == full_record()


def test_the_published_page_is_that_of_the_published_records(bench: dict[str, ModuleType]) -> None:
    """Tables are generated, never typed."""
    report = bench["report"]
    published = report.PAGE.read_text(encoding="utf-8")
    assert published == report.render(report.load_newest(), report.RESULTS.name)


def test_the_gate_is_red_on_a_failing_or_missing_test(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    red = tmp_path / "test_red.py"
    red.write_text("def test_sum():\n    assert 1 + 1 == 3\n")
    verdict = bench["gate"].run_tests("-c", "/dev/null", paths=(str(red),))
    assert not verdict.green
    assert "test_sum" in verdict.output
    assert bench["gate"].run_tests(paths=("tests/none",)).output == "there is no tests/none"


def test_the_gate_says_when_nothing_is_selected(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    (tmp_path / "test_green.py").write_text("def test_sum():\n    assert 1 + 1 == 2\n")
    verdict = bench["gate"].run_tests("-c", "/dev/null", "-k", "nothing", paths=(str(tmp_path),))
    assert verdict.empty
    assert not verdict.green


def given_arguments(bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, green: bool) -> ModuleType:
    run = bench["run"]
    monkeypatch.setattr(sys, "argv", ["run.py", "--quick"])
    verdict = bench["gate"].Verdict(green, False, "" if green else "1 failed")
    monkeypatch.setattr(run.gate, "run_tests", lambda *_, **__: verdict)
    monkeypatch.setattr(run.ceilings, "measure", lambda _: pytest.fail("measured"))
    monkeypatch.setattr(run, "publish", lambda *_: pytest.fail("written"))
    return run


def test_nothing_is_measured_or_written_behind_a_red_gate(
    bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = given_arguments(bench, monkeypatch, green=False)
    monkeypatch.setattr(run.peers, "ensure", lambda: pytest.fail("installed"))
    assert run.main() == 1
    assert "nothing measured: the operators' tests are not green.\n1 failed" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["operators", "engines"])
def test_nothing_is_measured_when_a_peer_disagrees(
    bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    run = given_arguments(bench, monkeypatch, green=True)
    monkeypatch.setattr(run.peers, "ensure", lambda: bench["peers"].Peers(Path("python")))
    monkeypatch.setattr(run.engines, "write_models", lambda *_: None)
    for module in ("operators", "engines"):
        sentences = ["a peer and kimi-linear differ by 1.0e-02"] if module == where else []
        monkeypatch.setattr(bench[module], "disagreements", lambda *_, found=sentences: (list(found), {}))
    assert run.main() == 1
    assert "nothing measured: a peer and kimi-linear differ by 1.0e-02." in capsys.readouterr().err


def test_an_unknown_part_is_refused(bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "dance"])
    with pytest.raises(SystemExit):
        bench["run"].parse_arguments()
    monkeypatch.setattr(sys, "argv", ["run.py", "context"])
    assert isinstance(bench["run"].parse_arguments(), argparse.Namespace)
