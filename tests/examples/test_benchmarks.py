"""The benchmarks measure what they say, refuse on a red test, and their tables come from their records."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

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
    case = bench["cases"].Case(70, "float32", backward=True, H=2, K=8, V=4)
    folder = tmp_path_factory.mktemp("inputs")
    bench["cases"].write_inputs(case, folder)
    return case, folder


def test_flop_are_those_of_the_recurrence(bench: dict[str, ModuleType]) -> None:
    forward, both = (bench["cases"].Case(10, "float32", backward) for backward in (False, True))
    # 7 K V a token-head: 114,688 at K = V = 128.
    assert forward.flop == 10 * 8 * 114_688
    assert both.flop == 10 * 8 * 27 * 128 * 128


def test_a_run_covers_the_lengths_dtypes_and_directions(bench: dict[str, ModuleType]) -> None:
    full = bench["cases"].cases(quick=False)
    assert {case.T for case in full} == {512, 2048, 8192}
    assert len({(case.T, case.dtype, case.backward) for case in full}) == len(full) == 12
    assert {case.T for case in bench["cases"].cases(quick=True)} == {512}


def test_a_worker_runs_what_it_was_started_for(bench: dict[str, ModuleType], inputs: tuple[Any, Path]) -> None:
    case, folder = inputs
    settings = bench["run"].QUICK
    with bench["processes"].Worker("kimi-linear:reference", keep=True) as worker:
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
        bench["processes"].Worker("no-such-package", keep=False).__enter__()


def test_a_worker_out_of_time_is_stopped(bench: dict[str, ModuleType], inputs: tuple[Any, Path]) -> None:
    case, folder = inputs
    with bench["processes"].Worker("kimi-linear:reference", keep=False) as worker:
        bench["operators"].load(worker, case, folder, bench["run"].QUICK)
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
        outside = bytearray(64 * 2**20)
        outside[::4096] = b"x" * len(outside[::4096])
        return []

    peak, outputs = bench["worker"].resident_peak(call)
    assert outputs == 0
    assert peak > 60 * 2**20
    assert bench["worker"].allocated_peak(call)[0] == 0


def test_a_backend_that_refuses_becomes_a_row_with_its_reason(
    bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kimi_linear.base.registry import Registry
    from kimi_linear.ops.registry import Backend, Op

    op = Op("delta_rule")
    op.add(Backend("triton", lambda *_: None, lambda call: ["no GPU"], ""))
    table = Registry[Op]("operator")
    table.add("delta_rule", op)
    monkeypatch.setattr(bench["operators"], "OPS", table)
    from kimi_linear.ops.delta_rule import api

    monkeypatch.setattr(api, "DELTA_RULE", op)
    case = bench["cases"].Case(512, "float32", backward=False)
    assert list(bench["operators"].our_backends(case)) == [("triton", "cannot: no GPU")]


def test_missing_peers_become_rows_with_the_reason(bench: dict[str, ModuleType]) -> None:
    case = bench["cases"].Case(512, "float32", backward=False)
    rows = [row for row, _ in bench["operators"].participants(case, bench["peers"].Peers(None, "no network"))]
    reasons = {row.implementation: row.reason for row in rows}
    assert reasons["fla"] == reasons["attn-gym"] == "not installed: no network"


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


def record(quick: bool = False) -> dict[str, Any]:
    """A record with one case: ours at 2 microseconds, one peer at 7, one stopped."""

    def row(implementation: str, us: float | None, reason: str = "") -> dict[str, Any]:
        made = {"implementation": implementation, "version": "1.2", "reason": reason, "memory": None}
        case = {"T": 512, "dtype": "float32", "backward": False, "B": 1, "H": 8, "K": 128, "V": 128}
        made |= {"case": case, "seconds": []}
        if us is not None:
            made |= {"us_per_token_head": {"low": us - 0.5, "median": us, "high": us + 0.5}, "gflops": 114.688 / us}
            made["memory"] = {"allocated_per_channel": 12.34, "resident_per_channel": None}
        return made

    machine = {"machine": "toy-2-cores", "cpu": "Toy", "flags": ["avx2"], "cores": 2, "threads": 2, "load": 0.1}
    machine |= {"system": "Linux x86_64", "python": "3.11.0", "torch": "2.13.0", "commit": "abc"}
    names = ("gemm_float32", "gemm_bfloat16", "batched_gemm_float32", "batched_gemm_bfloat16", "copy_gigabytes")
    rows = [row("kimi-linear:chunk", 2.0), row("fla", 7.0), row("attn-gym", None, "stopped after 120 s")]
    ceilings = dict.fromkeys(names, 100.0)
    return {"date": "2026-01-01 00:00 UTC", "quick": quick, "machine": machine, "ceilings": ceilings, "rows": rows}


def test_the_tables_hold_the_numbers_of_the_record(bench: dict[str, ModuleType]) -> None:
    text = bench["report"].render([record()], "results")
    assert "| kimi-linear chunk | 512 | 2.00 | 1.50 to 2.50 | 57.3 | 57.3 % | 3.50x | - |" in text
    assert "| fla 1.2 `naive_chunk_kda` | 512 | 7.00 | 6.50 to 7.50 | 16.4 | 16.4 % | - | - |" in text
    assert 'attn-gym 1.2 `chunk_kda(impl="reference")` | 512 | stopped after 120 s |' in text
    assert "| kimi-linear chunk | 512 | 12.3 | - |" in text
    assert "results/toy-2-cores.png" in text


def test_the_newest_record_of_a_machine_is_shown_with_its_plot(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    old = record()
    new = {**record(), "date": "2026-02-01 00:00 UTC"}
    (tmp_path / "z-old.json").write_text(bench["run"].to_json(old))
    (tmp_path / "a-new.json").write_text(bench["run"].to_json(new))
    bench["report"].write(tmp_path, tmp_path / "RESULTS.md")
    text = (tmp_path / "RESULTS.md").read_text()
    assert "2026-02-01" in text
    assert "2026-01-01" not in text
    assert "(./toy-2-cores.png)" in text
    assert (tmp_path / "toy-2-cores.png").read_bytes().startswith(b"\x89PNG")


def test_a_record_survives_json(bench: dict[str, ModuleType]) -> None:
    assert json.loads(bench["run"].to_json(record())) == record()


def test_the_published_tables_are_those_of_the_published_records(bench: dict[str, ModuleType]) -> None:
    """Tables are generated, never typed."""
    report = bench["report"]
    records = report.load_newest()
    published = report.TABLES.read_text(encoding="utf-8") if report.TABLES.exists() else None
    assert published == (report.render(records, report.RESULTS.name) if records else None)


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


def test_nothing_is_measured_or_written_behind_a_red_gate(
    bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = bench["run"]
    monkeypatch.setattr(sys, "argv", ["run.py"])
    monkeypatch.setattr(run.gate, "run_tests", lambda: bench["gate"].Verdict(False, False, "1 failed"))
    monkeypatch.setattr(run, "measure_all", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(run, "save", lambda *_: pytest.fail("written"))
    assert run.main() == 1
    assert "nothing measured: the operator's tests are not green.\n1 failed" in capsys.readouterr().err


def test_nothing_is_measured_when_a_peer_disagrees(
    bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = bench["run"]
    monkeypatch.setattr(sys, "argv", ["run.py", "--quick"])
    monkeypatch.setattr(run.gate, "run_tests", lambda: bench["gate"].Verdict(True, False, ""))
    monkeypatch.setattr(run.peers, "ensure", lambda: bench["peers"].Peers(Path("python")))
    monkeypatch.setattr(run.operators, "disagreements", lambda *_: ["fla and kimi-linear differ in o by 1.0e-02"])
    monkeypatch.setattr(run, "measure_all", lambda *_: pytest.fail("measured"))
    assert run.main() == 1
    assert "differ in o by 1.0e-02." in capsys.readouterr().err


def gpu_check(*options: str) -> str:
    command = [sys.executable, str(FOLDER / "gpu_check.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_check_says_that_there_is_no_gpu_and_succeeds() -> None:
    assert gpu_check() == "no GPU: torch.cuda is not available here, so nothing was checked.\n"


def test_the_gpu_check_shows_its_plan() -> None:
    plan = gpu_check("--dry-run").splitlines()
    assert {line.split()[0] for line in plan} == {"check", "test", "time"}


def test_the_gpu_check_compares_with_the_float64_reference(
    bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison itself runs on any device; here the one there is."""
    check = bench["gpu_check"]
    monkeypatch.setattr(check, "DEVICE", "cpu")
    case = bench["cases"].Case(7, "float32", backward=True, H=2, K=8, V=8)
    assert check.check(case, "chunk") == ""
    right = check.call

    def wrong(inputs: list[torch.Tensor], backend: str, backward: bool) -> list[torch.Tensor]:
        o, *others = right(inputs, backend, backward)
        return [o * (1.01 if backend == "chunk" else 1.0), *others]

    monkeypatch.setattr(check, "call", wrong)
    assert check.check(case, "chunk").startswith("o is off by 1.0e-02, allowed")


def test_a_ceiling_is_a_rate(bench: dict[str, ModuleType]) -> None:
    machine = bench["machine"]
    assert machine.gemm_rate(torch.float32, (8, 8, 8), 1, 0.0) > 0
    assert machine.copy_rate(0.0, size=2**16) > 0
    assert machine.slug("AMD EPYC 9B45 (x) @ 3GHz", 2) == "amd-epyc-9b45-2-cores"
    assert machine.describe()["cores"] >= 1
