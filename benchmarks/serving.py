"""The worker's side of the conversation: one JSON line in, one JSON line out. Imports nothing of ours, so that it runs
in either environment.
"""

import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Handler = Callable[[dict[str, Any]], Any]
# A bad allocation inside a native library ends as one of these.
FAILURES = (MemoryError, RuntimeError, ValueError, OSError, NotImplementedError)


def hide_fla() -> None:
    """Make `fla` look absent: with it and triton importable, transformers picks kernels that need a GPU, and dies."""
    sys.modules["fla"] = None  # type: ignore[assignment]


def limit_memory(extra_bytes: int) -> None:
    """Make an allocation beyond what is mapped now plus `extra_bytes` fail, rather than take the machine down."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + extra_bytes, mapped + extra_bytes))


def resident(field: str = "VmRSS") -> int:
    """Return VmRSS or VmHWM (the peak) of this process in bytes; Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def forget_peak() -> None:
    """Let the peak begin anew at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def sentence(error: BaseException) -> str:
    """Return an error as one line for a table."""
    if isinstance(error, MemoryError) or "allocate" in str(error) or "bad_alloc" in str(error):
        return "out of memory"
    return f"{type(error).__name__}: {error}".splitlines()[0]


def serve(start: Callable[[dict[str, Any]], tuple[Handler, dict[str, Any]]]) -> None:
    """Start what the first argument describes, then answer commands until standard input ends.

    The first line out is {"value": about} or {"error": sentence}; then one for each command.
    """
    given = json.loads(sys.argv[1])
    # Answers go to the real standard output; whatever a package prints goes to standard error.
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**reply: Any) -> None:
        stream.write(json.dumps(reply) + "\n")
        stream.flush()

    try:
        handle, about = start(given)
    except Exception as error:
        answer(error=sentence(error))
        return
    if given.get("memory") and sys.platform == "linux":
        limit_memory(given["memory"])
    answer(value=about)
    for line in sys.stdin:
        try:
            answer(value=handle(json.loads(line)))
        except FAILURES as error:
            answer(error=sentence(error))
