"""Progress for a person: a bar on a terminal, now and then a line anywhere else."""

import sys
import time
from typing import TextIO

from tqdm import tqdm

from kimi_linear.training.callbacks.base import Callback, EvalRecord, FitResult, StepRecord

# The bar's unit is a thousandth of the budget, so it serves runs bounded by steps and runs bounded by time.
_TICKS = 1000


class Progress(Callback):
    """Shows loss, tokens/s and time left.

    Args:
        stream: Where to write; standard error by default.
        every_seconds: Time between two lines where the stream is not a terminal.

    Example:
        >>> progress = Progress(every_seconds=10)
    """

    def __init__(self, stream: TextIO | None = None, every_seconds: float = 30.0) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._every_seconds = every_seconds
        self._bar: tqdm | None = None
        self._last_line = float("-inf")

    def on_start(self, step: int) -> None:
        """Draw the empty bar, on a terminal only."""
        if self._stream.isatty():
            self._bar = tqdm(
                total=_TICKS, file=self._stream, dynamic_ncols=True, bar_format="{percentage:3.0f}%|{bar}| {desc}"
            )

    def on_step(self, record: StepRecord) -> None:
        """Move the bar, or print a line when one is due."""
        if self._bar is not None:
            self._bar.n = round(record.progress * _TICKS)
            self._bar.set_description_str(describe(record))
        elif time.monotonic() - self._last_line >= self._every_seconds:
            self._last_line = time.monotonic()
            self._say(f"{record.progress:4.0%}  {describe(record)}")

    def on_eval(self, record: EvalRecord) -> None:
        """Print what was measured, above the bar."""
        values = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in record.metrics.items())
        self._say(f"step {record.step}: {values}")

    def on_end(self, result: FitResult) -> None:
        """Remove the bar and say how the run ended."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._say(f"{result.status} at step {result.step}: {result.tokens:,} tokens in {clock(result.seconds)}")

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)


def describe(record: StepRecord) -> str:
    """Return step, loss, speed and time left in one line."""
    return (
        f"step {record.step}  loss {record.loss:.3f}  {record.tokens_per_second:,.0f} tok/s  "
        f"{clock(record.seconds_left)} left"
    )


def clock(seconds: float) -> str:
    """Return a duration as m:ss, or h:mm:ss from an hour on.

    Example:
        >>> clock(185)
        '3:05'
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
