"""The training loop: accumulate, clip, step, evaluate, save; resumable at any step, bit for bit.

The loop knows a model only by `model(input_ids, labels=..., cu_seqlens=...).loss`, and what a person sees only by
callbacks.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import FrameType

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from kimi_linear.base.errors import ConfigError, KimiLinearError
from kimi_linear.base.registry import unknown_name
from kimi_linear.training.callbacks.base import Callback, EvalRecord, FitResult, StepRecord
from kimi_linear.training.checkpoint import MAY_DIFFER, CheckpointStore, Snapshot
from kimi_linear.training.data import PackedBatch, PackedBatches
from kimi_linear.training.optim import Optimizers
from kimi_linear.training.precision import PRECISIONS, Precision, autocast, choose_precision
from kimi_linear.training.schedule import Schedule


class TrainingError(KimiLinearError):
    """Training cannot go on: the loss or its gradient is not finite, or the data has nothing to predict."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and in what steps to train.

    Args:
        max_steps: Optimizer steps; with `max_minutes` too, whichever comes first.
        max_minutes: Wall time of the loop, evaluations included; the schedule then follows time.
        accumulation: Micro-batches per optimizer step.
        max_grad_norm: Bound on the global L2 norm of the gradient; None for no bound.
        precision: "fp32", "bf16" (autocast), or "auto": measured once, kept for the whole run.
        eval_every: Steps between evaluations; None for one at the end only.
        checkpoint_every: Steps between checkpoints; None for by time only.
        checkpoint_minutes: Minutes between checkpoints; None for by steps only.
        keep_checkpoints: How many of the newest to keep.
    """

    max_steps: int | None = field(default=None, metadata=MAY_DIFFER)
    max_minutes: float | None = field(default=None, metadata=MAY_DIFFER)
    accumulation: int = 1
    max_grad_norm: float | None = 1.0
    precision: str = "auto"
    eval_every: int | None = field(default=None, metadata=MAY_DIFFER)
    checkpoint_every: int | None = field(default=None, metadata=MAY_DIFFER)
    checkpoint_minutes: float | None = field(default=10.0, metadata=MAY_DIFFER)
    keep_checkpoints: int = field(default=2, metadata=MAY_DIFFER)

    def __post_init__(self) -> None:
        if self.max_steps is None and self.max_minutes is None:
            raise ConfigError("train: max_steps and max_minutes are both missing; give at least one.")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"train.precision: {unknown_name('precision', self.precision, list(PRECISIONS))}")
        for name, value in asdict(self).items():
            if isinstance(value, (int, float)) and not value > 0:
                raise ConfigError(f"train.{name} is {value}, expected more than 0.")


class Trainer:
    """Runs optimizer steps until the budget is used or a signal asks it to stop.

    Args:
        model: The network, with float32 weights, on the device it trains on.
        optimizers: From `build_optimizers(model, ...)`.
        schedule: Multiplier of the learning rate as a function of progress.
        batches: Micro-batches and the position among them.
        config: See `TrainConfig`.
        callbacks: Observers, told in order.
        evaluate: Measures the model, in eval mode, without gradients, under the run's precision.
        after_step: Called after every optimizer step; a mixture of experts updates its router bias here.
        store: Where checkpoints go and a run is resumed from; None for neither.

    Example: `kimi_linear.recipes.train` puts one together from a configuration.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizers,
        schedule: Schedule,
        batches: PackedBatches,
        config: TrainConfig,
        callbacks: Sequence[Callback] = (),
        *,
        evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
        after_step: Sequence[Callable[[], None]] = (),
        store: CheckpointStore | None = None,
    ) -> None:
        self.model, self.optimizers, self.schedule, self.batches = model, optimizers, schedule, batches
        self.config, self.callbacks, self.evaluate, self.after_step = config, callbacks, evaluate, after_step
        self.store, self.device = store, next(model.parameters()).device
        self.step, self.tokens, self.metrics = 0, 0, dict[str, float]()
        self.precision = Precision(config.precision)
        self._seconds_before, self._started = 0.0, time.monotonic()
        self._last_save, self._step_seconds, self._stop = self._started, 0.0, False

    def stop(self) -> None:
        """Let the current step finish, save and return from `fit` with status "interrupted"; for callbacks."""
        self._stop = True

    @property
    def seconds(self) -> float:
        """Seconds of training so far, earlier parts of a resumed run included."""
        return self._seconds_before + time.monotonic() - self._started

    def fit(self) -> FitResult:
        """Resume from the newest complete checkpoint, if any, and train until the budget is used.

        SIGTERM and SIGINT let the current step finish, save and return with status "interrupted"; a second one acts
        as it would without us.

        Raises:
            TrainingError: The loss or the gradient is not finite; the weights are those before the step.
            CheckpointError: A checkpoint cannot be read or written.
        """
        status = "failed"
        with _stop_on_signals() as must_stop:
            try:
                self._begin()
                status = self._run(must_stop)
            finally:
                result = FitResult(
                    status=status, step=self.step, tokens=self.tokens, seconds=self.seconds, metrics=self.metrics
                )
                for callback in self.callbacks:
                    callback.on_end(result)
        return result

    def _begin(self) -> None:
        self.model.train()
        self._started = self._last_save = time.monotonic()
        snapshot = self.store.resume(self.model, self.optimizers) if self.store else None
        if snapshot is not None:
            self.step, self.tokens, self.metrics = snapshot.step, snapshot.tokens, snapshot.metrics
            self._seconds_before, self.precision = snapshot.seconds, Precision(**snapshot.precision)
            self.batches.load_state(snapshot.position)
        elif self.precision.name == "auto":
            self.precision = self._measure_precision()
        for callback in self.callbacks:
            callback.on_start(self.step)
        if snapshot is None:
            # Step 0 is kept too: a full disk shows before the work, and a resumed run keeps the measured precision.
            self._save()

    def _measure_precision(self) -> Precision:
        position = self.batches.state()
        batch = next(self.batches)
        self.batches.load_state(position)
        return choose_precision(self.model, lambda trial: self._loss(trial, batch), self.device)

    def _run(self, must_stop: Callable[[], bool]) -> str:
        while self._progress(self.step, self.seconds) < 1.0:
            record = self._step()
            for callback in self.callbacks:
                callback.on_step(record)
            done, stop = record.progress >= 1.0, self._stop or must_stop()
            if self.evaluate is not None and (done or self._is_due(self.config.eval_every)):
                self._evaluate(self.evaluate)
            if done or stop or self._must_save():
                self._save()
            if stop and not done:
                return "interrupted"
        return "finished"

    def _step(self) -> StepRecord:
        start, tokens_before = self.seconds, self.tokens
        # The rate belongs to where the step ends; a step is expected to take as long as the one before.
        multiplier = self.schedule(self._progress(self.step + 1, start + self._step_seconds))
        loss = self._accumulate_gradients()
        norm = self._clip_gradients(loss)
        self.optimizers.step(multiplier)
        for hook in self.after_step:
            hook()
        self.step += 1
        seconds = self.seconds
        self._step_seconds = seconds - start
        self.metrics |= {"loss": loss, "grad_norm": norm}
        progress = self._progress(self.step, seconds)
        return StepRecord(
            step=self.step,
            loss=loss,
            learning_rate=self.optimizers.learning_rate * multiplier,
            grad_norm=norm,
            tokens=self.tokens,
            tokens_per_second=(self.tokens - tokens_before) / max(self._step_seconds, 1e-9),
            seconds=seconds,
            progress=progress,
            seconds_left=seconds * (1.0 - progress) / progress,
        )

    def _accumulate_gradients(self) -> float:
        """Add up the gradient of the mean loss over all targets of the step's micro-batches; return that mean."""
        batches = [next(self.batches) for _ in range(self.config.accumulation)]
        targets = sum(batch.num_targets for batch in batches)
        if targets == 0:
            raise TrainingError(f"step {self.step + 1} has no token to predict; use longer sequences or documents.")
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in batches:
            if batch.num_targets:
                # Each loss is a mean over its own targets, so a micro-batch counts by how many it has.
                share = batch.num_targets / targets
                with autocast(self.precision.name, self.device):
                    loss = self._loss(self.model, batch)
                (loss * share).backward()
                total += loss.detach().double() * share
            self.tokens += batch.input_ids.numel()
        return total.item()

    def _loss(self, model: nn.Module, batch: PackedBatch) -> Tensor:
        input_ids, labels, cu_seqlens = (t.to(self.device) for t in (batch.input_ids, batch.labels, batch.cu_seqlens))
        return model(input_ids, labels=labels, cu_seqlens=cu_seqlens).loss

    def _clip_gradients(self, loss: float) -> float:
        """Scale the gradients down to the bound; return their norm before that."""
        parameters = list(self.model.parameters())
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        value = norm.item()
        for what, number in (("loss", loss), ("norm of the gradient", value)):
            if not math.isfinite(number):
                self.optimizers.zero_grad()
                raise TrainingError(
                    f"step {self.step + 1}: the {what} is {number}; training stopped before the weights changed. Lower "
                    f"learning_rate (now {self.optimizers.learning_rate:g}), or look at the data of this step."
                )
        if self.config.max_grad_norm is not None:
            clip_grads_with_norm_(parameters, self.config.max_grad_norm, norm)
        return value

    @torch.no_grad()
    def _evaluate(self, evaluate: Callable[[nn.Module], dict[str, float]]) -> None:
        self.model.eval()
        with autocast(self.precision.name, self.device):
            metrics = evaluate(self.model)
        self.model.train()
        self.metrics |= metrics
        for callback in self.callbacks:
            callback.on_eval(EvalRecord(step=self.step, metrics=metrics))

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _must_save(self) -> bool:
        minutes = self.config.checkpoint_minutes
        by_time = minutes is not None and time.monotonic() - self._last_save >= 60 * minutes
        return by_time or self._is_due(self.config.checkpoint_every)

    def _save(self) -> None:
        if self.store is None:
            return
        snapshot = Snapshot(
            step=self.step,
            tokens=self.tokens,
            seconds=self.seconds,
            metrics=self.metrics,
            precision=asdict(self.precision),
            position=self.batches.state(),
        )
        path = self.store.save(self.model, self.optimizers, snapshot)
        self._last_save = time.monotonic()
        for callback in self.callbacks:
            callback.on_checkpoint(self.step, path)

    def _progress(self, step: int, seconds: float) -> float:
        """Return the fraction of the budget that so many steps and seconds use."""
        by_steps = step / self.config.max_steps if self.config.max_steps else 0.0
        by_time = seconds / (60 * self.config.max_minutes) if self.config.max_minutes else 0.0
        return min(max(by_steps, by_time), 1.0)


@contextmanager
def _stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGTERM or SIGINT into an answer True; only the main thread can receive one."""
    received = threading.Event()
    is_main = threading.current_thread() is threading.main_thread()
    # None stands for a handler that Python did not install and cannot put back.
    handlers = {n: signal.getsignal(n) or signal.SIG_DFL for n in (signal.SIGTERM, signal.SIGINT) if is_main}

    def stop(number: int, frame: FrameType | None) -> None:
        received.set()
        for number, handler in handlers.items():
            signal.signal(number, handler)

    for number in handlers:
        signal.signal(number, stop)
    try:
        yield received.is_set
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
