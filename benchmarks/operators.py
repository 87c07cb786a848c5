"""Kimi Delta Attention, forward and forward + backward: every backend of ours beside the peers, in turn, in one run.

Each implementation has a process of its own with the same inputs, threads and allocator settings. They are timed one
after the other, round after round (A B A B), so that whatever else the machine does falls on all of them.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cases import write_inputs
from kimi_linear.base.numerics import TOLERANCES, relative_error
from kimi_linear.recipes.bench.cases import Case, main_cases
from kimi_linear.recipes.bench.operators import operator_row, our_backends
from kimi_linear.recipes.bench.record import Row
from peers import Peers
from processes import Worker, WorkerError

SCRIPT = "worker.py"
OURS = "kimi-linear:"
PEERS = ("fla", "attn-gym", "transformers")
OUTPUTS = ("o", "final state", "d_q", "d_k", "d_v", "d_log_decay", "d_beta")
LONGEST_FOR_PEERS = 512
SMALL = Case(128, "float32", backward=True, H=2, K=32, V=32)


@dataclass(frozen=True)
class Settings:
    """How long a measurement may take."""

    rounds: int
    # A turn of an implementation lasts at least this long, or one call.
    turn_seconds: float
    # A call longer than this is stopped, and the implementation has no number for the case.
    call_seconds: float
    # An implementation that has used this much has no further rounds.
    budget_seconds: float


FULL = Settings(rounds=3, turn_seconds=0.2, call_seconds=30.0, budget_seconds=2.0)
QUICK = Settings(rounds=2, turn_seconds=0.1, call_seconds=30.0, budget_seconds=2.0)


class Workers:
    """The processes of a run, each started when first wanted and again after it was ended."""

    def __init__(self, peers: Peers) -> None:
        self.peers = peers
        self._running: dict[str, Worker] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._running.values():
            worker.close()

    def get(self, implementation: str) -> Worker:
        """Return the process of an implementation."""
        if implementation not in self._running:
            worker = Worker(SCRIPT, {"implementation": implementation}, self.python(implementation), keep=True)
            self._running[implementation] = worker.__enter__()
        return self._running[implementation]

    def drop(self, implementation: str) -> None:
        """Forget a process that has ended."""
        if worker := self._running.pop(implementation, None):
            worker.close()

    def python(self, implementation: str) -> Path:
        """Return the interpreter that has an implementation."""
        if implementation.startswith(OURS):
            return Path(sys.executable)
        if self.peers.python is None:
            raise WorkerError(f"not installed: {self.peers.reason}")
        return self.peers.python


def participants(case: Case) -> Iterator[tuple[str, str]]:
    """Yield the name of each implementation with its reason not to take part in a case, or ""."""
    for name, reason in our_backends(case):
        yield f"{OURS}{name}", reason
    # Longer, a peer's call takes most of a minute and so much memory that ours would be timed on a machine short of it.
    reason = "" if case.T <= LONGEST_FOR_PEERS else f"measured up to T = {LONGEST_FOR_PEERS}"
    yield from ((peer, reason) for peer in PEERS)


def load(worker: Worker, case: Case, folder: Path, settings: Settings) -> None:
    """Hand a worker the inputs of a case."""
    worker.ask(settings.call_seconds, do="load", folder=str(folder), dtype=case.dtype, backward=case.backward)


class CaseTurns:
    """The implementations on one case: who still runs, what each took, and why one has nothing."""

    def __init__(self, case: Case, workers: Workers, settings: Settings) -> None:
        self.case, self.workers, self.settings = case, workers, settings
        self.reasons = dict(participants(case))
        self.seconds: dict[str, list[float]] = {name: [] for name in self.reasons}
        self.versions: dict[str, str] = {}

    def _try(self, name: str, action: Callable[[Worker], None]) -> None:
        try:
            action(self.workers.get(name))
        except WorkerError as error:
            self.reasons[name], self.seconds[name] = str(error), []
            self.workers.drop(name)

    def begin(self, name: str, folder: Path) -> None:
        """Load the inputs and make a call that is not counted."""

        def action(worker: Worker) -> None:
            self.versions[name] = worker.about["version"]
            load(worker, self.case, folder, self.settings)
            first = worker.ask(self.settings.call_seconds, do="time", min_seconds=0.0)
            # One call may use up the budget: then it is the measurement.
            if sum(first) > self.settings.budget_seconds:
                self.seconds[name] = first

        self._try(name, action)

    def turn(self, name: str) -> None:
        """Let an implementation run for a turn; it counts with its median call."""

        def action(worker: Worker) -> None:
            timeout = self.settings.call_seconds + self.settings.turn_seconds
            calls = worker.ask(timeout, do="time", min_seconds=self.settings.turn_seconds)
            self.seconds[name].append(statistics.median(calls))

        if not self.reasons[name] and sum(self.seconds[name]) < self.settings.budget_seconds:
            self._try(name, action)

    def rows(self) -> list[Row]:
        """Return the rows."""
        return [
            operator_row(name, self.case, self.seconds[name], self.versions.get(name, ""), reason)
            for name, reason in self.reasons.items()
        ]


def measure_memory(row: Row, case: Case, workers: Workers, folder: Path, settings: Settings) -> None:
    """Fill a row's memory, from a fresh process with the system's allocator as it comes."""
    given = {"implementation": row.engine}
    try:
        with Worker(SCRIPT, given, workers.python(row.engine), keep=False) as worker:
            load(worker, case, folder, settings)
            found = worker.ask(settings.call_seconds * 4, do="memory")
    except WorkerError as error:
        row.extra["memory"] = {"reason": str(error)}
        return
    elements = case.token_heads * case.K
    allocated, outputs = found["allocated"]
    memory = {"allocated_per_channel": (allocated - outputs) / elements, "resident_per_channel": None}
    if found["resident"] is not None:
        memory["resident_per_channel"] = (found["resident"][0] - found["resident"][1]) / elements
    row.extra["memory"] = memory


def measure_case(case: Case, workers: Workers, settings: Settings, *, memory: bool) -> list[Row]:
    """Measure one case: times in turn, then memory one by one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(case, folder)
        turns = CaseTurns(case, workers, settings)
        for engine, reason in list(turns.reasons.items()):
            if not reason:
                turns.begin(engine, folder)
        for _ in range(settings.rounds):
            for engine in turns.reasons:
                turns.turn(engine)
        rows = turns.rows()
        for row in rows:
            # What could not be timed would be stopped again, or was refused memory.
            if memory and row.values:
                measure_memory(row, case, workers, folder, settings)
    return rows


def measure(peers: Peers, settings: Settings, quick: bool) -> Iterator[Row]:
    """Yield the rows of every case that the peers take part in."""
    cases = main_cases(quick)
    longest = max(case.T for case in cases)
    with Workers(peers) as workers:
        for case in cases:
            memory = case.dtype == "float32" and case.backward and longest <= case.T
            yield from measure_case(case, workers, settings, memory=memory)


def outputs_of(implementation: str, workers: Workers, folder: Path, settings: Settings) -> list[torch.Tensor]:
    """Return everything one call of an implementation produces on the small case."""
    target = folder / implementation.replace(":", "-")
    target.mkdir()
    worker = workers.get(implementation)
    load(worker, SMALL, folder, settings)
    worker.ask(settings.call_seconds, do="save", folder=str(target))
    return [torch.from_numpy(np.load(target / f"{number}.npy")) for number in range(len(OUTPUTS))]


def disagreements(peers: Peers, settings: Settings) -> tuple[list[str], dict[str, Any]]:
    """Compare each peer's outputs and gradients with ours on a small case.

    Both work in float32, so either may be off by the tolerance's row; together by twice that.

    Returns:
        One sentence for each output that differs, and the largest error of each peer for the record.
    """
    if peers.python is None:
        return [], {}
    allowed = TOLERANCES["float32"]
    limits = (allowed.output, allowed.output, *[allowed.gradient] * 3, *[allowed.gate_gradient] * 2)
    sentences, errors = [], {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = stack.enter_context(Workers(peers))
        write_inputs(SMALL, folder)
        ours = outputs_of("kimi-linear:reference", workers, folder, settings)
        for peer in PEERS:
            try:
                theirs = outputs_of(peer, workers, folder, settings)
            except WorkerError:
                # It has no numbers either; its rows say why.
                workers.drop(peer)
                continue
            found = {name: relative_error(x, y) for name, x, y in zip(OUTPUTS, theirs, ours, strict=True)}
            errors[peer] = found
            for (name, error), limit in zip(found.items(), limits, strict=True):
                if error > 2 * limit:
                    sentences.append(f"{peer} and kimi-linear differ in {name} by {error:.1e}, allowed {2 * limit:.1e}")
    return sentences, errors
