"""The check on a GPU, without one: its counts, its plan, and what it does when something fails."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from support.source_tree import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu_check.py"


def gpu_check(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_bytes_and_operations_are_those_of_the_specification(gpu: SimpleNamespace) -> None:
    counts = gpu.counts
    assert counts.forward_bytes() == 1282
    assert counts.forward_bytes() + counts.kept_bytes() == 2050
    assert counts.backward_bytes() == 3076
    assert counts.training_bytes() == 2050 + 3076
    flop = {C: round(counts.forward_flop(C=C)) for C in (16, 32, 64, 128)}
    assert flop == {16: 114859, 32: 131755, 64: 166571, 128: 240299}
    assert counts.backward_flop() == 409600
    # The specification counts 18 bytes of slots and rates besides.
    assert counts.decode_bytes() == 132372 - 18
    assert counts.decode_bytes(state_item=2) == 66836 - 18
    assert counts.decode_flop() == 114688


def test_a_case_moves_what_its_token_heads_move(gpu: SimpleNamespace) -> None:
    case = gpu.shapes.find("fwd 1x8192x96")
    # At 4.3 TB/s and 790 TFLOP/s.
    assert case.work().bytes / 4.3e9 == pytest.approx(0.234, abs=1e-3)
    assert case.work().flop / 790e9 == pytest.approx(0.166, abs=1e-3)
    states = gpu.shapes.find("decode 128x32")
    assert states.work().bytes / 4.3e6 == pytest.approx(126, abs=0.5)
    shared = gpu.counts.forward_bytes(shared=0.5)
    assert shared == 1282 - 256


def test_the_plan_holds_the_shapes_that_kernels_are_compared_by(gpu: SimpleNamespace) -> None:
    keys = {case.key for group in gpu.shapes.GROUPS.values() for case in group}
    for shape in ("1x8192x96", "1x8192x64", "1x8192x16"):
        assert {f"kda fwd {shape}", f"kda fwd+bwd {shape}"} <= keys
    for shape in ("2x16384x16", "4x2048x16", "4x4096x64", "8x2048x32 D256", "8x1024x8 D64", "1x65536x32"):
        assert f"kda fwd {shape}" in keys
    assert {f"kda fwd 1x65536x{H}" for H in (16, 8, 4)} <= keys
    assert {f"kda fwd 1x{T}x{H}" for T in (128, 512, 1024, 4096) for H in (16, 64)} <= keys
    assert {f"kda fwd 1x{T}x{H} graph" for T in (128, 512, 1024) for H in (16, 64)} <= keys
    assert {f"kda fwd 1x8192x{H} packed{n}" for H in (96, 64) for n in (6, 8)} <= keys
    states = {case.token_heads for case in gpu.shapes.DECODE}
    assert min(states) == 8
    assert max(states) == 24576
    assert {case.pool for case in gpu.shapes.DECODE} == {"float32", "bfloat16"}
    assert {case.op for case in gpu.shapes.OPERATORS} == gpu.others.INPUTS.keys()
    assert sum(gpu.shapes.MIXED) == 8192
    assert len(keys) == sum(len(group) for group in gpu.shapes.GROUPS.values())


def test_the_plan_fits_into_its_budget_and_that_into_a_call(gpu: SimpleNamespace) -> None:
    assert gpu.plan.estimate(gpu.plan.STEPS, gpu.plan.BUDGET) < gpu.plan.BUDGET < 600


def test_every_case_survives_its_record(gpu: SimpleNamespace) -> None:
    for group in gpu.shapes.GROUPS.values():
        for case in group:
            for own in (case, case.tiny()):
                assert gpu.shapes.case_of(own.section, json.loads(json.dumps(own.as_dict()))) == own


def test_steps_come_in_their_own_order_and_unknown_ones_are_refused(gpu: SimpleNamespace) -> None:
    assert gpu.plan.chosen(()) == gpu.plan.STEPS
    assert gpu.plan.chosen(("decode", "contracts")) == ("contracts", "decode")
    with pytest.raises(KeyError, match="no step 'dance'"):
        gpu.plan.chosen(("dance",))
    with pytest.raises(SystemExit):
        gpu.check.parse_arguments(["--only", "dance"])
    assert gpu.check.parse_arguments(["--only", "decode"]).steps == ("decode",)
    with pytest.raises(KeyError, match="no case 'fwd 9x9x9'"):
        gpu.shapes.find("fwd 9x9x9")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so() -> None:
    done = gpu_check()
    assert (done.returncode, done.stdout) == (0, "no GPU: torch.cuda is not available here, so nothing was checked.\n")


def test_a_dry_run_shows_every_case_and_that_it_can_be_built(gpu: SimpleNamespace) -> None:
    before = sorted((ROOT / "benchmarks" / "results").rglob("*"))
    done = gpu_check("--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in gpu.contracts.suites():
        assert f"contract  {name}" in done.stdout
    for step, group in gpu.shapes.GROUPS.items():
        for case in group:
            assert f"{step:9} {case.key} " in done.stdout
    assert "1,008.2 MB        131.0 GFLOP" in done.stdout
    assert "PROBLEM" not in done.stdout
    assert sorted((ROOT / "benchmarks" / "results").rglob("*")) == before


def test_a_call_that_cannot_be_built_is_a_problem_of_the_dry_run(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("no such layer")

    monkeypatch.setitem(gpu.measure.BUILDERS, "layer", broken)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--dry-run", "--only", "layer"])
    assert gpu.check.main() == 1
    assert "PROBLEM   layer T=4096 cannot be built: ValueError: no such layer" in capsys.readouterr().out


def test_a_missing_suite_is_a_problem(gpu: SimpleNamespace, tmp_path: Path) -> None:
    assert gpu.contracts.missing() == []
    folder = tmp_path / "src" / "kimi_linear" / "ops" / "gate" / "triton"
    folder.mkdir(parents=True)
    (folder / "backend.py").touch()
    (tmp_path / "tests" / "ops").mkdir(parents=True)
    found = gpu.contracts.missing(tmp_path)
    assert "there is no tests/contracts/test_delta_rule.py" in found
    assert "no suite runs the kernels of gate" in found


@pytest.mark.slow
def test_a_rehearsal_runs_every_benchmark(gpu: SimpleNamespace, tmp_path: Path) -> None:
    done = gpu_check("--rehearse", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    assert found["rehearsal"]
    assert found["unmeasured"] == []
    timed = {(row["section"], row["engine"]) for row in found["rows"] if "median" in row}
    assert {("kda", "kimi-linear"), ("kda", "plain"), ("decode", "kimi-linear"), ("decode", "plain")} <= timed
    layer = {"KDA", "KDA core", "KDA plain", "MLA SDPA", "MLA SDPA padded"}
    assert {("layer", name) for name in layer} | {("operators", n) for n in ("kimi-linear", "plain", "torch")} <= timed
    operators = {row["case"]["op"] for row in found["rows"] if row["section"] == "operators" and "median" in row}
    assert operators == gpu.others.INPUTS.keys()
    # What has no time says why: a peer that is not here, states in bfloat16 where they are refused.
    untimed = [row for row in found["rows"] if "median" not in row]
    assert all("No module named 'fla'" in r["reason"] or r["case"].get("pool") == "bfloat16" for r in untimed)
    assert "A rehearsal on a CPU" in (tmp_path / "GPU.md").read_text()


def test_every_kernel_of_a_case_is_shown(gpu: SimpleNamespace) -> None:
    lines = gpu.profiling.table(gpu.shapes.find("fwd 1x128x16"), gpu.setting.REHEARSAL, calls=1)
    assert lines[0].startswith("kda fwd 1x128x16: ")
    assert any("kda_core_chunk" in text for text in lines)


Builder = Callable[..., Any]


def with_contenders(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, **calls: Any) -> Any:
    """Give a case these contenders, and return it."""
    checks = {name: call.check for name, call in calls.items() if hasattr(call, "check")}

    def build(case: Any, setting: Any, skip: tuple[str, ...] = ()) -> Any:
        own = {name: call for name, call in calls.items() if name not in skip}
        return gpu.delta.Contenders(calls=own, checks={n: c for n, c in checks.items() if n in own})

    monkeypatch.setitem(gpu.measure.BUILDERS, "kda", build)
    return gpu.shapes.find("fwd 1x8192x96")


def measured(gpu: SimpleNamespace, case: Any, **changes: Any) -> tuple[dict[str, dict[str, Any]], str]:
    setting = gpu.setting.REHEARSAL
    reply = gpu.measure.measure(case, setting, changes.pop("clock", setting.clock()), **changes)
    return {row["engine"]: row for row in reply["rows"]}, reply["lost"]


def test_a_contender_that_fails_is_reported_and_the_next_is_timed(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: int) -> None:
        raise RuntimeError("no kernel image\nmore")

    case = with_contenders(gpu, monkeypatch, broken=broken, whole=lambda _: None)
    rows, lost = measured(gpu, case)
    assert rows["broken"]["reason"] == "RuntimeError: no kernel image more"
    assert "median" not in rows["broken"]
    assert rows["whole"]["median"] >= 0
    assert lost == ""


@pytest.mark.parametrize("error", [0.02, float("nan")])
def test_a_wrong_result_is_not_timed(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    def wrong(_: int) -> None:
        pytest.fail("timed")

    wrong.check = lambda: {"o": (1e-4, 5e-3), "d_q": (error, 8e-3)}  # type: ignore[attr-defined]
    case = with_contenders(gpu, monkeypatch, wrong=wrong, whole=lambda _: None)
    rows, _ = measured(gpu, case)
    assert rows["wrong"]["reason"] == f"wrong result, not timed: off in d_q by {error:.1e}, allowed 8.0e-03"
    assert "median" in rows["whole"]


def test_the_checks_see_a_wrong_kernel(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the real contenders: results of the first and last head, and gradients, are held against float64."""
    delta, right = gpu.delta, gpu.delta.kda_core
    for backward in (False, True):
        case = gpu.shapes.Kda(T=40, H=3, backward=backward)
        contenders = gpu.measure.build(case, gpu.setting.REHEARSAL)
        errors = contenders.checks["kimi-linear"]()
        assert gpu.measure.verdict(errors) == ""
        assert len(errors) == (6 if backward else 1)

    def wrong(**inputs: Any) -> Any:
        o, state = right(**inputs)
        # Of the last head alone, and not where the reference is made.
        factor = torch.ones(o.shape[2], dtype=o.dtype)
        factor[-1] = 1.0 if o.dtype == torch.float64 else 1.02
        return o * factor[:, None], state

    monkeypatch.setattr(delta, "kda_core", wrong)
    contenders = gpu.measure.build(gpu.shapes.Kda(T=40, H=3, backward=True), gpu.setting.REHEARSAL)
    verdict = gpu.measure.verdict(contenders.checks["kimi-linear"]())
    assert verdict.startswith("wrong result, not timed: off in o by")


def test_the_decode_check_sees_a_wrong_state(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu.delta.kda_core_decode
    contenders = gpu.measure.build(gpu.shapes.Decode(N=4, H=2), gpu.setting.REHEARSAL)
    assert gpu.measure.verdict(contenders.checks["kimi-linear"]()) == ""

    def wrong(**inputs: Any) -> Any:
        o = right(**inputs)
        if inputs["pool"].dtype == torch.float32:
            inputs["pool"][0] += 0.01
        return o

    monkeypatch.setattr(gpu.delta, "kda_core_decode", wrong)
    contenders = gpu.measure.build(gpu.shapes.Decode(N=4, H=2), gpu.setting.REHEARSAL)
    assert "off in pool by" in gpu.measure.verdict(contenders.checks["kimi-linear"]())


def test_what_takes_too_long_is_not_timed(gpu: SimpleNamespace) -> None:
    class Slow(gpu.timing.HostClock):
        def times(self, call: Any, count: int) -> list[float]:
            return [2000.0] * count

    found = gpu.timing.compare({"slow": lambda _: None}, Slow(), gpu.timing.FULL, lambda: False)
    assert found["slow"].reason == "not timed: a call takes 2.0 s"
    assert found["slow"].ms == []


def test_contenders_take_turns_and_another_begins_every_round(gpu: SimpleNamespace) -> None:
    order: list[str] = []

    class Told(gpu.timing.HostClock):
        def times(self, call: Any, count: int) -> list[float]:
            order.append(call(0))
            return [10.0] * count

    calls = {name: lambda _, n=name: n for name in "abc"}
    found = gpu.timing.compare(calls, Told(), gpu.timing.Effort(rounds=3, host_calls=1), lambda: False)
    rounds = "".join(order)[-9:]
    assert [rounds[i : i + 3] for i in (0, 3, 6)] == ["abc", "bca", "cab"]
    assert all(timing.ms == [10.0] * 3 for timing in found.values())


class Script:
    """A process that answers from a list; an exception is raised."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.asked, self.ends = list(answers), [], 0

    def ask(self, seconds: float, **command: Any) -> Any:
        self.asked.append(command)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> None:
        self.ends += 1


def row(engine: str, **others: Any) -> dict[str, Any]:
    return {"section": "kda", "engine": engine, "case": {"T": 1, "H": 1}, "unit": "ms", **others}


def test_who_loses_the_gpu_is_left_out_of_another_try(gpu: SimpleNamespace) -> None:
    case = gpu.shapes.find("fwd 1x8192x96")
    fault = row("fla", reason="AcceleratorError: an illegal memory access was encountered")
    first = {"rows": [row("kimi-linear", reason="the GPU was lost by fla"), fault], "lost": "fla"}
    process = Script(first, {"rows": [row("kimi-linear", median=1.0)], "lost": ""})
    rows = gpu.session.measure_case(process, case, lambda: 5.0)
    assert [command["skip"] for command in process.asked] == [[], ["fla"]]
    assert process.ends == 1
    assert rows == [row("kimi-linear", median=1.0), fault]


def test_a_process_that_ends_is_a_reason_and_the_next_case_is_measured(gpu: SimpleNamespace) -> None:
    session = gpu.session.Session(gpu.setting.REHEARSAL, gpu.plan.Budget(), lambda text: None)
    lost = sys.modules["processes"].WorkerError("stopped after 60 s")
    session.process = Script(lost, {"rows": [row("KDA", median=2.0)], "lost": ""})
    cases = [gpu.shapes.find("layer T=4096"), gpu.shapes.find("layer T=32768")]
    session._measure(cases, lambda *_: "")
    assert [r.get("reason", r.get("median")) for r in session.found.rows] == ["stopped after 60 s", 2.0]


def test_a_peer_that_takes_too_long_costs_ours_nothing_and_is_soon_left_out(gpu: SimpleNamespace) -> None:
    session = gpu.session.Session(gpu.setting.REHEARSAL, gpu.plan.Budget(), lambda text: None)
    stopped = sys.modules["processes"].WorkerError("stopped after 75 s")
    fine = {"rows": [row("kimi-linear", median=2.0)], "lost": ""}
    session.process = Script(stopped, fine, stopped, fine, fine)
    session._measure([gpu.shapes.find(f"fwd 1x8192x{H}") for H in (96, 64, 16)], lambda *_: "")
    assert [command["skip"] for command in session.process.asked] == [[], ["fla"], [], ["fla"], ["fla"]]
    found = [(r["engine"], r.get("reason", r.get("median"))) for r in session.found.rows]
    peers = ["stopped after 75 s"] * 2 + ["left out: it was stopped before"]
    assert [reason for name, reason in found if name == "fla"] == peers
    assert [ms for name, ms in found if name == "kimi-linear"] == [2.0] * 3


def test_a_case_that_stops_every_process_is_a_reason_of_its_own(gpu: SimpleNamespace) -> None:
    ended = sys.modules["processes"].WorkerError("its process ended: Segmentation fault")
    rows = gpu.session.measure_case(Script(ended, ended), gpu.shapes.find("fwd 1x8192x96"), lambda: 5.0)
    assert [(r["engine"], r["reason"]) for r in rows] == [(name, str(ended)) for name in ("fla", "kimi-linear")]


def test_no_case_is_begun_when_the_budget_is_used(gpu: SimpleNamespace) -> None:
    clock = iter([0.0, *[100.0] * 2, *[519.0] * 50])
    budget = gpu.plan.Budget(540.0, now=lambda: next(clock))
    printed: list[str] = []
    session = gpu.session.Session(gpu.setting.REHEARSAL, budget, printed.append)
    session.process = Script({"rows": [row("kimi-linear", median=2.0)], "lost": ""})
    cases = [gpu.shapes.find(f"fwd 1x8192x{H}") for H in (96, 64, 16)]
    session._measure(cases, lambda *_: "row")
    assert len(session.found.rows) == 1
    assert session.found.unmeasured == ["kda fwd 1x8192x64", "kda fwd 1x8192x16"]
    assert printed == ["row", "no time was left for: kda fwd 1x8192x64; kda fwd 1x8192x16"]


def test_a_case_that_hangs_is_stopped(gpu: SimpleNamespace) -> None:
    process = gpu.session.Process("cpu")
    case = gpu.shapes.find("layer T=4096")
    (only,) = gpu.session.measure_case(process, case, lambda: 0.0)
    assert only["reason"] == "stopped after 0 s"
    assert gpu.shapes.case_of(only["section"], only["case"]) == case
    # The next one has a new process.
    assert process.ask(60, do="facts", commit="abc")["commit"] == "abc"
    process.end()


TESTS = """
import os

import pytest


def test_green():
    assert True


def test_red():
    assert 1 + 1 == 3


@pytest.mark.skip(reason="no")
def test_skipped():
    pass


def test_ends_the_process():
    if {crash}:
        os._exit(1)


@pytest.mark.parametrize("n", range(8))
def test_after_it(n):
    assert n >= 0
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_suites_are_run_and_every_outcome_counted(
    gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    monkeypatch.setattr(gpu.contracts, "processes_for", lambda cores: processes)
    suite = tmp_path / "test_some.py"
    suite.write_text(TESTS.format(crash=processes > 1))
    broken = tmp_path / "test_broken.py"
    broken.write_text("import no_such_module\n")
    outcomes, problem = gpu.contracts.run([str(suite), str(broken)], 120.0, device="cpu")
    assert {Path(name).name for name in outcomes} >= {"test_some.py", "test_broken.py"}
    found = {Path(name).name: outcome for name, outcome in outcomes.items()}
    some = found["test_some.py"]
    assert (some.passed, some.failed, some.skipped) == ((10, 1, 1) if processes == 1 else (9, 2, 1))
    assert some.failures[0].startswith("test_red: ")
    assert found["test_broken.py"].failed == 1
    assert "no_such_module" in found["test_broken.py"].failures[0]
    assert problem == ""


def test_suites_are_stopped_at_their_limit(gpu: SimpleNamespace, tmp_path: Path) -> None:
    contracts = gpu.contracts
    sleeping, variables = [sys.executable, "-c", "import time; time.sleep(600)"], contracts.environment(tmp_path, "cpu")
    assert contracts.wait_for(sleeping, variables, tmp_path / "printed", 0.5) is None
    outcomes, problem = contracts.run(["tests/base/test_errors.py"], 0.2, device="cpu")
    assert (outcomes, problem) == ({}, "stopped after 0 s")


def test_the_peer_is_measured_where_there_is_an_aim(gpu: SimpleNamespace) -> None:
    cases = [case for group in gpu.shapes.GROUPS.values() for case in group if case.section == "kda"]
    with_peer = {case.label for case in cases if gpu.delta.has_peer(case)}
    assert {"fwd 1x8192x96", "fwd 1x8192x64", "fwd 1x8192x16", "fwd+bwd 1x8192x96", "fwd 1x1024x16"} <= with_peer
    assert not {"fwd 1x65536x8", "fwd+bwd 4x4096x64", "fwd 8x2048x32 D256"} & with_peer


def test_a_failure_that_lost_the_gpu_keeps_its_own_reason(gpu: SimpleNamespace, tmp_path: Path) -> None:
    lines = [
        {"test": "a.py::x", "outcome": "failed", "seconds": 1.0, "reason": "GPU lost: illegal memory access"},
        {
            "test": "a.py::x",
            "outcome": "failed",
            "seconds": 0.0,
            "reason": "worker 'gw0' crashed while running 'a.py::x'",
        },
        {"test": "a.py::y", "outcome": "passed", "seconds": 1.0, "reason": ""},
        {"test": "a.py::y", "outcome": "failed", "seconds": 0.0, "reason": "in its teardown"},
    ]
    log = tmp_path / "log"
    log.write_text("\n".join(map(json.dumps, lines)) + '\n{"test": "a.py::z", "out')
    (outcome,) = gpu.contracts.read(log).values()
    assert (outcome.passed, outcome.failed) == (0, 2)
    assert outcome.failures == ["x: GPU lost: illegal memory access", "y: in its teardown"]
