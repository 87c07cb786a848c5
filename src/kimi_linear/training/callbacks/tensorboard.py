"""Metrics for TensorBoard, where it is installed."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from kimi_linear.base.errors import ConfigError
from kimi_linear.training.callbacks.base import Callback, EvalRecord, FitResult, StepRecord

_STEP_SCALARS = ("loss", "learning_rate", "grad_norm", "tokens_per_second")


class TensorBoard(Callback):
    """Writes scalars `train/...` and `eval/...` to an event directory. Imports TensorBoard only when a run starts.

    Example:
        >>> callbacks = [TensorBoard(Path("run/tensorboard"))] if TensorBoard.is_installed() else []
    """

    def __init__(self, directory: Path) -> None:
        if not self.is_installed():
            raise ConfigError("tensorboard is not installed; run `pip install tensorboard` or turn it off.")
        self._directory = directory
        self._writer: Any = None

    @staticmethod
    def is_installed() -> bool:
        """Whether the tensorboard package can be imported."""
        return importlib.util.find_spec("tensorboard") is not None

    def on_start(self, step: int) -> None:
        """Open an event file; viewers drop what an earlier, killed part of the run wrote past `step`."""
        module = importlib.import_module("torch.utils.tensorboard")
        self._writer = module.SummaryWriter(str(self._directory), purge_step=step + 1 if step else None)

    def on_step(self, record: StepRecord) -> None:
        """Write the scalars of a step."""
        for name in _STEP_SCALARS:
            self._writer.add_scalar(f"train/{name}", getattr(record, name), record.step)

    def on_eval(self, record: EvalRecord) -> None:
        """Write the scalars of an evaluation."""
        for name, value in record.metrics.items():
            self._writer.add_scalar(f"eval/{name}", value, record.step)

    def on_end(self, result: FitResult) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
