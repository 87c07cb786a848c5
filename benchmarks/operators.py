"""Kimi Delta Attention, forward and forward + backward: every backend of ours beside the peers, in turn, in one run.

Each implementation has a process of its own with the same inputs, threads and allocator settings. They are timed one
after the other, round after round (A B A B), so that whatever else the machine does falls on all of them.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cases import Case, make_inputs, write_inputs
from kimi_linear.base.errors import BackendError
from kimi_linear.base.numerics import TOLERANCES, relative_error
from kimi_linear.ops import OPS, kda
from peers import Peers
from processes import Worker, WorkerError

FLA, ATTN_GYM = "fla", "attn-gym"
PEERS = (FLA, ATTN_GYM)
OUTPUTS = ("o", "final state", "d_q", "d_k", "d_v", "d_log_decay", "d_beta")


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


@dataclass
class Row:
    """One implementation on one case."""

    implementation: str
    case: Case
    version: str = ""
    # Empty where there are numbers, else why there are none.
    reason: str = ""
    # The median call of each turn.
    seconds: list[float] = field(default_factory=list)
    memory: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for the record, with what follows from the times."""
        record: dict[str, Any] = {
            "implementation": self.implementation,
            "version": self.version,
            "case": self.case.as_dict(),
            "reason": self.reason,
            "seconds": [round(s, 6) for s in self.seconds],
            "memory": self.memory,
        }
        if self.seconds:
            low, middle, high = quartiles(self.seconds)
            record["us_per_token_head"] = {
                name: s * 1e6 / self.case.token_heads for name, s in (("low", low), ("median", middle), ("high", high))
            }
            record["gflops"] = self.case.flop * 1e-9 / middle
        return record


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def our_backends(case: Case) -> Iterator[tuple[str, str]]:
    """Yield every registered backend's name with its reason to refuse the case, or ""."""
    dtype = getattr(torch, case.dtype)
    inputs = make_inputs(Case(4, case.dtype, case.backward, case.B, case.H, case.K, case.V))
    for backend in OPS["delta_rule"].backends:
        tensors = [x if name == "log_decay" else x.to(dtype) for name, x in inputs.items()]
        try:
            kda(*(x.requires_grad_(case.backward) for x in tensors), backend=backend.name)
        except BackendError as error:
            lines = [line.strip() for line in str(error).splitlines()]
            said = [line for line in lines if line.startswith(f"{backend.name}: cannot: ")]
            yield backend.name, said[0].removeprefix(f"{backend.name}: ") if said else lines[0]
        else:
            yield backend.name, ""


def participants(case: Case, peers: Peers) -> Iterator[tuple[Row, Path | None]]:
    """Yield a row for each implementation with the interpreter that runs it; None: it cannot take part."""
    for name, reason in our_backends(case):
        yield Row(f"kimi-linear:{name}", case, reason=reason), None if reason else Path(sys.executable)
    for peer in PEERS:
        reason = "" if peers.python else f"not installed: {peers.reason}"
        yield Row(peer, case, reason=reason), peers.python


def time_in_turn(rows: list[tuple[Row, Path]], folder: Path, settings: Settings, advance: Callable[[], None]) -> None:
    """Fill the rows' times: a first call each that is not counted, then rounds in which each has its turn."""
    with ExitStack() as stack:
        running: dict[str, Worker] = {}
        for row, python in rows:
            try:
                worker = Worker(row.implementation, python, keep=True)
                stack.enter_context(worker)
                row.version = worker.about["version"]
                load(worker, row.case, folder, settings)
                worker.ask(settings.call_seconds, do="time", min_seconds=0.0)
                running[row.implementation] = worker
            except WorkerError as error:
                row.reason = str(error)
            advance()
        for _ in range(settings.rounds):
            for row, _python in rows:
                if row.implementation in running and sum(row.seconds) < settings.budget_seconds:
                    give_turn(row, running, settings)
                advance()


def load(worker: Worker, case: Case, folder: Path, settings: Settings) -> None:
    """Hand a worker the inputs of a case."""
    worker.ask(settings.call_seconds, do="load", folder=str(folder), dtype=case.dtype, backward=case.backward)


def give_turn(row: Row, running: dict[str, Worker], settings: Settings) -> None:
    """Let one implementation run for a turn."""
    try:
        timeout = settings.call_seconds + settings.turn_seconds
        calls = running[row.implementation].ask(timeout, do="time", min_seconds=settings.turn_seconds)
        row.seconds.append(statistics.median(calls))
    except WorkerError as error:
        del running[row.implementation]
        row.reason, row.seconds = str(error), []


def measure_memory(row: Row, python: Path, folder: Path, settings: Settings) -> None:
    """Fill a row's memory, from a fresh process with the system's allocator as it comes."""
    try:
        with Worker(row.implementation, python, keep=False) as worker:
            load(worker, row.case, folder, settings)
            found = worker.ask(settings.call_seconds * 4, do="memory")
    except WorkerError as error:
        row.memory = {"reason": str(error)}
        return
    elements = row.case.token_heads * row.case.K
    allocated, outputs = found["allocated"]
    row.memory = {"allocated_per_channel": (allocated - outputs) / elements, "resident_per_channel": None}
    if found["resident"] is not None:
        row.memory["resident_per_channel"] = (found["resident"][0] - found["resident"][1]) / elements


def measure(case: Case, peers: Peers, settings: Settings, advance: Callable[[], None]) -> list[Row]:
    """Measure one case: times in turn, then memory one by one. Calls `advance` as often as `steps` says."""
    found = list(participants(case, peers))
    able = [(row, python) for row, python in found if python is not None]
    for _ in range((len(found) - len(able)) * steps(settings)):
        advance()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(case, folder)
        time_in_turn(able, folder, settings, advance)
        for row, python in able:
            # What could not be timed would be stopped again, or was refused memory.
            if row.seconds:
                measure_memory(row, python, folder, settings)
            advance()
    return [row for row, _ in found]


def steps(settings: Settings) -> int:
    """Return how often `measure` advances for each implementation."""
    return settings.rounds + 2


def count_implementations() -> int:
    """Return how many implementations a case has."""
    return len(OPS["delta_rule"].backends) + len(PEERS)


def outputs_of(implementation: str, python: Path, case: Case, folder: Path, settings: Settings) -> list[torch.Tensor]:
    """Return everything one call of an implementation produces."""
    target = folder / implementation.replace(":", "-")
    target.mkdir()
    with Worker(implementation, python, keep=False) as worker:
        load(worker, case, folder, settings)
        worker.ask(settings.call_seconds, do="save", folder=str(target))
    return [torch.from_numpy(np.load(target / f"{number}.npy")) for number in range(len(OUTPUTS))]


def disagreements(peers: Peers, settings: Settings) -> list[str]:
    """Compare each peer's outputs and gradients with ours on a small case; one sentence for each that differs.

    Both work in float32, so either may be off by the tolerance's row; together by twice that.
    """
    if peers.python is None:
        return []
    case, found = Case(128, "float32", backward=True, H=2, K=32, V=32), []
    allowed = TOLERANCES["float32"]
    limits = (allowed.output, allowed.output, *[allowed.gradient] * 3, *[allowed.gate_gradient] * 2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(case, folder)
        ours = outputs_of("kimi-linear:reference", Path(sys.executable), case, folder, settings)
        for peer in PEERS:
            try:
                theirs = outputs_of(peer, peers.python, case, folder, settings)
            except WorkerError:
                # It has no numbers either; its rows say why.
                continue
            for output, x, y, limit in zip(OUTPUTS, theirs, ours, limits, strict=True):
                error = relative_error(x, y)
                if error > 2 * limit:
                    found.append(f"{peer} and kimi-linear differ in {output} by {error:.1e}, allowed {2 * limit:.1e}")
    return found
