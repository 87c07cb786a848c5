"""A process that renders a chat template within limits; see `kimi_linear.text.sandbox`."""

import json
import os
import subprocess
import sys
import threading
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kimi_linear.base.errors import DataError

_PROGRAM = Path(__file__).with_name("sandbox.py")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one rendering may take: seconds of processor time, characters of text, bytes of address space."""

    seconds: float = 10.0
    characters: int = 1 << 24
    bytes: int = 1 << 30


class TemplateWorker:
    """Renders one template in a process that starts with the first rendering and ends with this object.

    Threads may share it; they take turns. After a fork each process has its own.
    """

    def __init__(self, source: str, limits: Limits) -> None:
        self._source = source
        self._limits = limits
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def render(self, variables: dict[str, Any]) -> str:
        """Return the text of the template with variables of plain JSON values.

        Raises:
            DataError: The template is not valid, fails, asks for what the sandbox refuses, or exceeds a limit.
        """
        with self._lock:
            if self._process is None or self._owner != os.getpid():
                self._start()
            return self._ask(variables)

    def _start(self) -> None:
        # -P: the program's own folder holds modules that must not hide others of the same name. A process group of its
        # own: Ctrl-C at a terminal is meant for us.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            process_group=0,
            text=True,
            encoding="utf-8",
        )
        self._owner = os.getpid()
        self._stop = weakref.finalize(self, _end, self._process, self._owner)
        try:
            self._ask({"source": self._source, **asdict(self._limits)})
        except DataError:
            self._forget()
            raise

    def _ask(self, message: dict[str, Any]) -> str:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
        except (OSError, ValueError) as error:
            self._forget()
            raise DataError(
                f"the chat template was stopped: it takes more than {self._limits.seconds:g} s of processor time or "
                f"{self._limits.bytes >> 20} MiB of memory; use another one."
            ) from error
        except BaseException:
            # Interrupted between question and answer: the next answer would belong to this question.
            self._forget()
            raise
        if answer["error"] is not None:
            words = " ".join(answer["error"].split())[:300]
            raise DataError(f"the chat template cannot render this conversation ({words}).")
        return answer["text"]

    def _forget(self) -> None:
        self._stop()
        self._process = None


def _end(process: subprocess.Popen[str], owner: int) -> None:
    if os.getpid() != owner:
        return
    process.kill()
    process.communicate()
