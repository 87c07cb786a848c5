"""Metrics as one JSON object a line, each step once, whatever was killed in between."""

import dataclasses
import json
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from kimi_linear.base.files import atomic_file
from kimi_linear.base.writing import explain_write_errors
from kimi_linear.training.callbacks.base import Callback, EvalRecord, FitResult, StepRecord


class JsonlMetrics(Callback):
    """Appends to a file: `{"kind": "step", "step": 1, "loss": ...}` and `{"kind": "eval", "step": 10, ...}`.

    When a run resumes after step s, lines of later steps are dropped first, and so is a line cut short by a kill: the
    file ends up as if the run had never been broken, times aside.

    Example:
        >>> metrics = JsonlMetrics(Path("metrics.jsonl"))
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def on_start(self, step: int) -> None:
        """Drop what is later than `step` and open the file for appending."""
        kept = [entry for entry in read_metrics(self._path) if entry["step"] <= step]
        with explain_write_errors(self._path):
            with atomic_file(self._path) as temporary:
                temporary.write_text("".join(map(_line, kept)), encoding="utf-8")
            self._file = self._path.open("a", encoding="utf-8")

    def on_step(self, record: StepRecord) -> None:
        """Append a step."""
        self._write({"kind": "step", **dataclasses.asdict(record)})

    def on_eval(self, record: EvalRecord) -> None:
        """Append an evaluation."""
        self._write({"kind": "eval", "step": record.step, **record.metrics})

    def on_end(self, result: FitResult) -> None:
        """Close the file."""
        if self._file is not None:
            # What could not be written was said when it was tried; closing tries it once more.
            with suppress(OSError):
                self._file.close()
            self._file = None

    def _write(self, entry: dict[str, Any]) -> None:
        if self._file is None:
            raise RuntimeError("JsonlMetrics wrote before on_start")
        with explain_write_errors(self._path):
            self._file.write(_line(entry))
            # One line leaves the process at a time, so a kill can cut the last line only.
            self._file.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    r"""Return the entries of a metrics file in order; what a kill or a power cut left unreadable is left out.

    Example:
        >>> _ = Path("metrics.jsonl").write_text('{"kind": "step", "step": 1, "loss": 2.5}\n{"kind": "ste')
        >>> [entry["loss"] for entry in read_metrics(Path("metrics.jsonl"))]
        [2.5]
    """
    if not path.exists():
        return []
    # Whatever follows the last line end was cut short by a kill.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    return [entry for line in lines if (entry := _parsed(line)) is not None]


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and "step" in entry else None
