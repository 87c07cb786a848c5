"""Observers of a training run: metrics files, TensorBoard, progress."""

from kimi_linear.training.callbacks.base import Callback, EvalRecord, FitResult, StepRecord
from kimi_linear.training.callbacks.jsonl import JsonlMetrics, read_metrics
from kimi_linear.training.callbacks.progress import Progress
from kimi_linear.training.callbacks.tensorboard import TensorBoard

__all__ = [
    "Callback",
    "EvalRecord",
    "FitResult",
    "JsonlMetrics",
    "Progress",
    "StepRecord",
    "TensorBoard",
    "read_metrics",
]
