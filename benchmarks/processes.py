"""Starting workers and talking to them: one JSON line there, one back, within a time limit."""

import json
import os
import selectors
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("worker.py")
# glibc keeps freed memory instead of handing it back, for every implementation alike: otherwise a call is dominated by
# the page faults of its first touch, which favours whoever allocates less.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}


class WorkerError(Exception):
    """A worker could not do what it was told; the text is one sentence for the table."""


def available_memory() -> int:
    """Return the bytes that can be taken without swapping, or 0 where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return 0
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


class Worker:
    """One implementation in a process of its own; leave the context, or let it fail, and the process is gone."""

    def __init__(self, implementation: str, python: Path | str = sys.executable, *, keep: bool) -> None:
        # Two thirds of what is free: enough to be fair, not enough to push the machine into swapping.
        self._limit = available_memory() * 2 // 3
        environment = {**os.environ, **(KEEP_MEMORY if keep else {})}
        environment.pop("KIMI_LINEAR_BACKEND", None)
        if implementation.startswith("kimi-linear"):
            environment["PYTHONPATH"] = str(ROOT / "src")
        else:
            environment.pop("PYTHONPATH", None)
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- closed with the process, in `close`
        self._process = subprocess.Popen(
            [str(python), str(WORKER), implementation, str(torch.get_num_threads()), str(self._limit)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self.about: dict[str, str] = {}

    def __enter__(self) -> "Worker":
        self.about = self._receive(120)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None and not stream.closed:
                stream.close()

    def ask(self, timeout: float, **request: Any) -> Any:
        """Send a command and return the answer; on any error the process is ended and WorkerError raised."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            # The second where this side has closed the pipe, after an earlier error.
            self.close()
            raise WorkerError("its process ended") from None
        return self._receive(timeout)

    def _receive(self, timeout: float) -> Any:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            ready = selector.select(timeout)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            reason = f"stopped after {timeout:.0f} s" if not ready else f"its process ended: {self._last_words()}"
            self.close()
            raise WorkerError(reason)
        reply = json.loads(line)
        if "error" in reply:
            self.close()
            memory = f" (limit {self._limit / 2**30:.0f} GiB)" if reply["error"] == "out of memory" else ""
            raise WorkerError(reply["error"] + memory)
        return reply["value"]

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return lines[-1] if lines else f"exit status {self._process.poll()}"
