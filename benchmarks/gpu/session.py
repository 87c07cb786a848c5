"""Takes the steps one after the other, each in processes of its own, and hands on what they found."""

import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from gpu import contracts, plan
from gpu.delta import FLA, OURS, PLAIN
from gpu.plan import Budget
from gpu.setting import Setting
from gpu.shapes import Case
from processes import HERE, Worker, WorkerError

Say = Callable[[str], None]
SCRIPT = "gpu_worker.py"
# Compile beside the contracts; more would take the cores of the tests.
COMPILERS = 3
# Seconds to compile everything of one case.
COMPILE_LIMIT = 150.0
# Where the incumbent takes part, and how often it may cost a process before it no longer does.
PEER_SECTIONS = ("kda", "decode")
PEER_CHANCES = 2
# A case is begun again without the contender that lost the GPU.
ATTEMPTS = 3
# How a process says so.
STOPPED = ("stopped after", "its process ended")


def search_path() -> list[str]:
    """Return the folders a worker finds its modules in: ours, and what the user has named."""
    return [str(HERE), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


class Process:
    """A worker that is started when needed, and again after it was lost."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._worker: Worker | None = None

    def ask(self, seconds: float, **command: Any) -> Any:
        """Send a command and return the answer.

        Raises:
            WorkerError: The process ended, was stopped after `seconds`, or could not be started.
        """
        try:
            if self._worker is None:
                # CUDA maps far more than it uses: no limit of addresses.
                given = {"device": self._device, "memory": 0}
                self._worker = Worker(SCRIPT, given, keep=False, path=search_path()).__enter__()
            return self._worker.ask(seconds, **command)
        except WorkerError:
            self.end()
            raise

    def end(self) -> None:
        """End the process; the next command starts another."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def measure_case(
    process: Process, case: Case, seconds: Callable[[], float], without: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """Return the rows of a case; a contender that loses the GPU has its reason, and the others another try.

    So has the peer where the process is stopped or ends, for that compiles and tunes itself. `without` names who does
    not take part, and why.
    """
    empty = {"section": case.section, "case": case.as_dict(), "unit": "ms"}
    rows: dict[str, dict[str, Any]] = {}
    lost = {name: {**empty, "engine": name, "reason": reason} for name, reason in (without or {}).items()}
    for _ in range(ATTEMPTS):
        command = {"section": case.section, "case": case.as_dict(), "skip": list(lost)}
        try:
            reply = process.ask(seconds(), do="measure", **command)
        except WorkerError as error:
            culprit = OURS if FLA in lost or case.section not in PEER_SECTIONS else FLA
            lost[culprit] = {**empty, "engine": culprit, "reason": str(error)}
            if culprit == OURS:
                return list(lost.values())
            continue
        rows = {row["engine"]: row for row in reply["rows"]}
        if not reply["lost"]:
            break
        process.end()
        lost[reply["lost"]] = rows.get(reply["lost"], {})
    return [row for row in {**rows, **lost}.values() if row]


@dataclass
class Found:
    """What a session found."""

    facts: dict[str, Any] = field(default_factory=dict)
    ceilings: dict[str, Any] = field(default_factory=dict)
    contracts: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Session:
    """One run over the chosen steps.

    Args:
        setting: Where it runs.
        budget: How long it may take.
        say: Prints a line.
        commit: What the code is, where git does not say.
    """

    def __init__(self, setting: Setting, budget: Budget, say: Say, commit: str = "") -> None:
        self.setting, self.budget, self.say, self.commit = setting, budget, say, commit
        self.process = Process(setting.device)
        self.peer_stops = 0
        self.found = Found()

    def run(self, steps: tuple[str, ...], line: Callable[[dict[str, Any], dict[str, Any]], str]) -> Found:
        """Take the steps; `line` is how a row is printed."""
        try:
            self._attempt(
                "facts", lambda: self.found.facts.update(self.process.ask(60, do="facts", commit=self.commit))
            )
            for name, value in self.found.facts.items():
                self.say(f"{name:16} {value}")
            self._before_times(steps)
            if "ceilings" in steps:
                self._attempt("ceilings", lambda: self.found.ceilings.update(self.process.ask(90, do="ceilings")))
                for name, value in self.found.ceilings.items():
                    self.say(f"{name:16} {value:,.0f}" if isinstance(value, float) else f"{name:16} {value}")
            self._measure(self._cases(steps), line)
        finally:
            self.process.end()
        return self.found

    def _cases(self, steps: tuple[str, ...]) -> list[Case]:
        """Return the cases; in a rehearsal one of those that shrink to the same."""
        found = list(plan.cases(steps))
        return found if self.setting.on_gpu else list({case.tiny().key: case for case in found}.values())

    def _attempt(self, what: str, action: Callable[[], None]) -> None:
        try:
            action()
        except WorkerError as error:
            self.found.problems.append(f"{what}: {error}")
            self.say(f"{what}: {error}")

    def _before_times(self, steps: tuple[str, ...]) -> None:
        """Run the contracts and, beside them, compile what will be timed; nothing is timed meanwhile."""
        if not self.setting.on_gpu:
            self.say("contracts: not rehearsed")
            return
        with_contracts = "contracts" in steps
        seconds = self.budget.before_times(with_contracts)
        until = self.budget.used + seconds
        compiling = Compiling(self.setting.device, self._cases(steps))
        compiling.start()
        if with_contracts:
            outcomes, problem = contracts.run(contracts.suites(), seconds)
            for name, outcome in outcomes.items():
                self.found.contracts[name] = outcome.as_dict()
                self.say(f"{name:56} {outcome.verdict}")
                for failure in outcome.failures[:5]:
                    self.say(f"    {failure}")
            for name in contracts.suites():
                if name not in outcomes:
                    self.found.contracts[name] = contracts.Outcome().as_dict()
                    self.say(f"{name:56} not run")
            if problem:
                self.found.problems.append(f"contracts: {problem}")
                self.say(f"contracts: {problem}")
        compiling.wait(until - self.budget.used)
        self.say(compiling.summary())

    def _measure(self, cases: list[Case], line: Callable[[dict[str, Any], dict[str, Any]], str]) -> None:
        for case in cases:
            if not self.budget.allows(case):
                self.found.unmeasured.append(case.key)
                continue
            tired = case.section in PEER_SECTIONS and self.peer_stops >= PEER_CHANCES
            without = {FLA: "left out: it was stopped before"} if tired else {}
            for row in measure_case(self.process, case, self.budget.limit, without):
                self.found.rows.append(row)
                self.say(line(row, self.found.ceilings))
                self.peer_stops += row["engine"] == FLA and row.get("reason", "").startswith(STOPPED)
        if self.found.unmeasured:
            self.say(f"no time was left for: {'; '.join(self.found.unmeasured)}")


class Compiling:
    """Processes that call every case once, so that its kernels are in Triton's cache when it is timed."""

    def __init__(self, device: str, cases: Iterable[Case]) -> None:
        self._device = device
        # Ours for every case first; the peer compiles and tunes for minutes.
        self._cases: SimpleQueue[tuple[Case, tuple[str, ...]]] = SimpleQueue()
        known = list(cases)
        for case in known:
            self._cases.put((case, (FLA,)))
        for case in known:
            if case.section in PEER_SECTIONS and not getattr(case, "graph", False):
                self._cases.put((case, (OURS, PLAIN)))
        self._processes = [Process(device) for _ in range(COMPILERS)]
        self._threads = [
            threading.Thread(target=self._work, args=(process,), daemon=True) for process in self._processes
        ]
        self._stopped = threading.Event()
        self.done = 0
        self.problems: list[str] = []

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def _work(self, process: Process) -> None:
        while not self._stopped.is_set():
            try:
                case, skip = self._cases.get_nowait()
            except Empty:
                break
            try:
                command = {"section": case.section, "case": case.as_dict(), "skip": skip}
                problem = process.ask(COMPILE_LIMIT, do="warm", **command)
            except (WorkerError, OSError, ValueError) as error:
                problem = "" if self._stopped.is_set() else str(error)
            self.done += 1
            if problem:
                self.problems.append(f"{case.key}: {problem}")
        process.end()

    def wait(self, seconds: float) -> None:
        """Wait for the end of all, at most so long; then end what still runs."""
        share = seconds
        for thread in self._threads:
            started = time.monotonic()
            thread.join(max(0.0, share))
            share -= time.monotonic() - started
        self._stopped.set()
        for process in self._processes:
            process.end()

    def summary(self) -> str:
        """Return what became of it in words."""
        problems = [f"\n    {problem}" for problem in self.problems[:10]]
        return f"compiled for {self.done} calls, {len(self.problems)} with problems{''.join(problems)}"


def results_folder() -> Path:
    """Return where records are kept: apart from the CPU's, whose page reads all of its own folder."""
    return HERE / "results" / "gpu"
