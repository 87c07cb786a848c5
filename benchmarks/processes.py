"""Starting workers and talking to them: one JSON line there, one back, within a time limit."""

import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from kimi_linear.recipes.bench.machine import memory_bytes

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# glibc keeps freed memory instead of handing it back, for every implementation alike: otherwise a call is dominated by
# the page faults of its first touch, which favours whoever allocates less.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}


class WorkerError(Exception):
    """A worker could not do what it was told; the text is one sentence for the table."""


class Worker:
    """One engine in a process of its own; leave the context, or let it fail, and the process is gone.

    Args:
        script: Of this folder, run with one JSON argument.
        given: That argument, without the number of threads and the memory limit.
        python: The interpreter.
        keep: Whether the C library keeps freed memory; see KEEP_MEMORY.
        share: Of the free memory that it may take.
        path: Further folders of the interpreter's search path, behind our own.
    """

    def __init__(
        self,
        script: str,
        given: dict[str, Any],
        python: Path | str = sys.executable,
        *,
        keep: bool,
        share: float = 2 / 3,
        path: Sequence[Path | str] = (),
    ) -> None:
        # Enough to be fair, not enough to push the machine into swapping.
        self.limit = int(memory_bytes("MemAvailable") * share)
        environment = {**os.environ, **(KEEP_MEMORY if keep else {"KIMI_LINEAR_KEEP_MEMORY": "0"})}
        for name in ("KIMI_LINEAR_BACKEND", "PYTHONPATH"):
            environment.pop(name, None)
        if Path(python) == Path(sys.executable):
            environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT / "src", *path)))
        argument = {"threads": torch.get_num_threads(), "memory": self.limit, **given}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- closed with the process, in `close`
        self._process = subprocess.Popen(
            [str(python), str(HERE / script), json.dumps(argument)],
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
                # What was still to be sent to a process that has ended cannot be; closing says so.
                with suppress(OSError):
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
            memory = f" (limit {self.limit / 2**30:.0f} GiB)" if reply["error"] == "out of memory" else ""
            raise WorkerError(reply["error"] + memory)
        return reply["value"]

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return lines[-1] if lines else f"exit status {self._process.poll()}"
