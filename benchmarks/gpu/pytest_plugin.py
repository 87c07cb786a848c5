"""For pytest: one JSON line a test, and an end of the process whose GPU is lost, so that another goes on.

The file to append to is named by GPU_CHECK_LOG. Under pytest-xdist a process that ended is replaced.
"""

import json
import os
from typing import Any

import pytest
import torch

LOG = "GPU_CHECK_LOG"


def write(**line: Any) -> None:
    """Append a line; the processes of one run share the file."""
    with open(os.environ[LOG], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def why(report: Any) -> str:
    """Return the last line of what a test says it failed of."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr)
    lines = [line for line in text.splitlines() if line.strip()]
    return (lines[0] if crash is not None else lines[-1])[:300] if lines else "no message"


def is_lost() -> bool:
    """Whether the GPU no longer answers this process."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


class Reporter:
    """Writes the outcome of every test."""

    def __init__(self, is_worker: bool) -> None:
        self._is_worker = is_worker

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Write a test's outcome: of its call, or of what kept it from one."""
        if report.when == "call" or report.outcome != "passed":
            reason = "" if report.outcome == "passed" else why(report)
            if not self._is_worker:
                write(test=report.nodeid, outcome=report.outcome, seconds=report.duration, reason=reason)
            if report.failed and is_lost():
                write(test=report.nodeid, outcome="failed", seconds=report.duration, reason=f"GPU lost: {reason}")
                os._exit(1)

    def pytest_collectreport(self, report: Any) -> None:
        """Write a file that cannot be collected."""
        if report.failed and not self._is_worker:
            write(test=report.nodeid, outcome="failed", seconds=0.0, reason=why(report))


def pytest_configure(config: pytest.Config) -> None:
    """Register the reporter, in the process that runs everything and in each that it starts."""
    if LOG in os.environ:
        config.pluginmanager.register(Reporter(hasattr(config, "workerinput")), "gpu-check-reporter")
