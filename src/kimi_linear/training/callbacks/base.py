"""What a training run tells the outside: records, and the events that carry them."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step, after it was taken.

    `step` counts from 1. `loss` is the mean over all predicted tokens of the step, in nats. `grad_norm` is the global
    L2 norm before clipping. `tokens` and `seconds` are totals of the run, earlier parts of a resumed run included.
    `progress` is the fraction of the budget used; `seconds_left` is inferred from it.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    seconds: float
    progress: float
    seconds_left: float


@dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """What an evaluation measured after a step."""

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """How a call of `Trainer.fit` ended.

    `status` is "finished" (the budget is used), "interrupted" (a signal asked it to stop; resumable) or "failed" (an
    error is on its way to the caller). `metrics` holds the latest value of every measured quantity.
    """

    status: str
    step: int
    tokens: int
    seconds: float
    metrics: dict[str, float]


class Callback:
    """Observer of a run. Every method may be left as it is; none may change the model or the data.

    Order within a step: `on_step`, then `on_eval`, then `on_checkpoint`, where they are due.
    """

    def on_start(self, step: int) -> None:
        """Before the first step; `step` is the last one already done, 0 for a new run."""

    def on_step(self, record: StepRecord) -> None:
        """After an optimizer step."""

    def on_eval(self, record: EvalRecord) -> None:
        """After an evaluation."""

    def on_checkpoint(self, step: int, path: Path) -> None:
        """After a checkpoint is complete on disk."""

    def on_end(self, result: FitResult) -> None:
        """Once, whatever the way the run ended; the place to close files."""
