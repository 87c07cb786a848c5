"""Train a model from text: data, tokenizer, network, loop and metrics in one directory that can be run again.

    config.json            the resolved configuration; a run goes on only with the same network and data order
    tokenizer.json         trained on the training text, or copied
    data/                  token shards, training and validation
    checkpoints/           of the run in progress
    metrics.jsonl          one line a step and an evaluation
    tensorboard/           the same for TensorBoard, where that is installed
    model/                 the trained model in the released layout, with its tokenizer
    result.json            what came out; written last, so its presence means finished

Running a finished directory again says so and returns; an unfinished one goes on from its last checkpoint.
"""

import dataclasses
import fcntl
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from kimi_linear.base.config import from_dict, read_json, to_dict
from kimi_linear.base.errors import ConfigError
from kimi_linear.base.files import atomic_file
from kimi_linear.base.writing import explain_write_errors
from kimi_linear.checkpoint.save import save_checkpoint
from kimi_linear.evaluation.bits_per_byte import bits_per_byte
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.models.kimi_linear.model import KimiLinearLM
from kimi_linear.models.kimi_linear.presets import preset
from kimi_linear.training.callbacks import Callback, FitResult, JsonlMetrics, Progress, StepRecord, TensorBoard
from kimi_linear.training.checkpoint import MAY_DIFFER, CheckpointStore, require_same, resumable_with
from kimi_linear.training.data import (
    EmptySplitError,
    PackedBatches,
    TextSource,
    Tokenizer,
    TokenShards,
    ValidationBatches,
    prepare_shards,
)
from kimi_linear.training.loop import TrainConfig, Trainer
from kimi_linear.training.optim import OptimConfig, build_optimizers
from kimi_linear.training.precision import autocast
from kimi_linear.training.schedule import ScheduleConfig, build_schedule

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text and how it is cut.

    Args:
        location: "sotu" for the text that ships with the package, or a .txt, .jsonl or .parquet file or a directory.
        validation: Held-out text of its own; None holds documents of `location` out.
        text_field: Field or column that holds the text.
        tokenizer: A tokenizer.json to use; None trains one on the training text, of the model's vocab_size.
        seq_len: Tokens a row.
        batch_size: Rows a micro-batch.
        reset_documents: Begin each document with a fresh state.
    """

    location: str = "sotu"
    validation: str | None = None
    text_field: str = "text"
    tokenizer: str | None = None
    seq_len: int = 512
    batch_size: int = 8
    reset_documents: bool = True


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How held-out text is read. Windows of `seq_len` tokens (None: as in training), `batch_size` at a time.

    Evaluations during training read about `batches` batches, spread evenly; the final figure reads them all.
    """

    seq_len: int | None = field(default=None, metadata=MAY_DIFFER)
    batch_size: int = field(default=8, metadata=MAY_DIFFER)
    batches: int = field(default=16, metadata=MAY_DIFFER)

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise ConfigError(f"evaluation.batches is {self.batches}, expected at least 1.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a training run.

    Args:
        run_dir: Directory of the run.
        model: Name of a preset, or a whole model configuration as plain values.
        overrides: Plain values laid over the model configuration, nested as it is. Its vocab_size is what the
            tokenizer is trained to; the network then has as many rows as the tokenizer has tokens.
        data, evaluation, train, optim, schedule: The parts.
        seed: Of the weights and of the order of documents.
        device: Where to train, in torch's words.
        num_threads: CPU threads; None leaves torch's choice.
        tensorboard: Write TensorBoard files where it is installed.

    Example:
        >>> RunConfig(run_dir="runs/a", model="tiny", train=TrainConfig(max_steps=100)).train.max_steps
        100
    """

    run_dir: str = field(metadata=MAY_DIFFER)
    train: TrainConfig
    model: str | dict[str, Any] = "demo"
    overrides: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    seed: int = 0
    device: str = field(default="cpu", metadata=MAY_DIFFER)
    num_threads: int | None = field(default=None, metadata=MAY_DIFFER)
    tensorboard: bool = field(default=True, metadata=MAY_DIFFER)

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> "RunConfig":
        """Build from plain values, as in config.json; unknown keys and values of another type are errors."""
        return from_dict(cls, given, "config")

    def network(self) -> KimiLinearConfig:
        """Return the model configuration: the preset or the given one, with the overrides laid over it."""
        plain = preset(self.model).to_dict() if isinstance(self.model, str) else self.model
        return KimiLinearConfig.from_dict(_laid_over(plain, self.overrides))

    def resolved(self) -> "RunConfig":
        """Return the same run with the model written out, so that a later change of a preset changes no old run."""
        return dataclasses.replace(self, model=self.network().to_dict(), overrides={})


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run stands.

    `status` is "finished" or "interrupted". `metrics` holds the last training loss in nats and, where there is
    held-out text, its bits per byte: over all of it if finished, over the part read during training otherwise.
    `precision` is the arithmetic used, with the measurement behind an automatic choice. `model_dir` holds the trained
    model once finished.
    """

    run_dir: str
    model_dir: str
    status: str
    step: int
    tokens: int
    seconds: float
    metrics: dict[str, float]
    precision: dict[str, Any]
    max_steps: int | None
    max_minutes: float | None


def train(config: RunConfig, *, report: Report = print, callbacks: Sequence[Callback] = ()) -> RunResult:
    """Train a model, or go on with a run that was stopped, and save it with what was measured.

    Args:
        config: The run.
        report: Takes one sentence about what is being done.
        callbacks: Observers besides the metrics files and the progress on standard error.

    Returns:
        The result; read from result.json where the run was finished already.

    Raises:
        ConfigError: The configuration is impossible, differs from the one the run was started with, or another
            process uses the directory.
        DataError: The text cannot be used, or a file cannot be written.
        CheckpointError: No checkpoint is whole, or one cannot be written.
        TrainingError: The loss is not finite.

    Example:
        >>> _ = Path("notes.txt").write_text("to be or not to be " * 100)
        >>> data = DataConfig(location="notes.txt", seq_len=32, batch_size=2)
        >>> size = {"vocab_size": 270, "hidden_size": 32}
        >>> config = RunConfig(run_dir="run", model="tiny", overrides=size, data=data, train=TrainConfig(max_steps=2))
        >>> train(config, report=lambda sentence: None).status
        'finished'
    """
    config = config.resolved()
    directory = Path(config.run_dir)
    with _locked(directory):
        _check_and_write_config(directory, config)
        finished = _finished(directory, config)
        if finished is not None:
            report(f"{directory} is finished ({finished.step} steps); delete it or choose another to train again.")
            return finished
        return _Run(config, report, callbacks).execute()


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast a run trains: `tokens` in `seconds` of whole optimizer steps, the first steps left out."""

    tokens: int
    seconds: float
    precision: str


# A time budget that is not met.
_ENDLESS_MINUTES = 1e9


def training_speed(run_dir: str, seconds: float, *, warm_up: int = 2) -> Speed:
    """Train a fresh model on the prepared data of a run, keep the time and nothing else.

    Args:
        run_dir: Of a run whose data are prepared; nothing in it is changed.
        seconds: How long to measure at least, in whole steps.
        warm_up: Steps before that, left out; at least one.
    """
    config = RunConfig.from_dict(read_json(Path(run_dir) / "config.json"))
    endless = dataclasses.replace(config.train, max_steps=None, max_minutes=_ENDLESS_MINUTES)
    run = _Run(dataclasses.replace(config, run_dir=run_dir, train=endless, tensorboard=False), lambda line: None, ())
    trainer = run.trainer
    steps = _Steps(trainer, warm_up, seconds)
    trainer.evaluate, trainer.store, trainer.callbacks = None, None, [steps]
    trainer.fit()
    first, last = steps.first, steps.last
    return Speed(
        tokens=last.tokens - first.tokens, seconds=last.seconds - first.seconds, precision=trainer.precision.name
    )


class _Steps(Callback):
    """Keeps the last record of the warm-up and the newest, and stops when these are far enough apart."""

    def __init__(self, trainer: Trainer, warm_up: int, seconds: float) -> None:
        self._trainer, self._warm_up, self._seconds = trainer, warm_up, seconds

    def on_step(self, record: StepRecord) -> None:
        """Keep it."""
        self.last = record
        if record.step <= self._warm_up:
            self.first = record
        elif record.seconds - self.first.seconds >= self._seconds:
            self._trainer.stop()


class _Run:
    """One execution of `train`: the pieces, built in order, and what is done with them."""

    def __init__(self, config: RunConfig, report: Report, callbacks: Sequence[Callback]) -> None:
        self._config, self._report = config, report
        self._directory = Path(config.run_dir)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self._tokenizer, self._train_shards, self._held_out = _prepare_data(self._directory, config, report)
        self._model = self._build_model()
        self.trainer = self._build_trainer(callbacks)

    def execute(self) -> RunResult:
        """Train, measure, save."""
        fit = self.trainer.fit()
        if fit.status == "interrupted":
            self._report(f"stopped at step {fit.step}; run the same command again to go on from there.")
            return self._result(fit, fit.metrics)
        metrics = dict(fit.metrics)
        if self._held_out is not None:
            self._report("measuring bits per byte on all held-out text")
            self._model.eval()
            with autocast(self.trainer.precision.name, self.trainer.device):
                metrics["bits_per_byte"] = _measure(self._model, self._validation_batches(every=1))
        result = self._result(fit, metrics)
        save_checkpoint(
            self._model.state_dict(),
            self._model.config,
            result.model_dir,
            end_token_ids=(self._tokenizer.eos_id,),
            tokenizer_file=self._directory / "tokenizer.json",
        )
        _write_json(self._directory / "result.json", dataclasses.asdict(result))
        return result

    def _build_model(self) -> KimiLinearLM:
        eos = self._tokenizer.eos_id
        network = dataclasses.replace(
            self._config.network(),
            vocab_size=self._tokenizer.vocab_size,
            bos_token_id=eos,
            eos_token_id=eos,
            pad_token_id=None,
        )
        random.seed(self._config.seed)
        np.random.seed(self._config.seed)
        torch.manual_seed(self._config.seed)
        # Drawn on the CPU, so that the weights are the same for every device.
        return KimiLinearLM(network).to(_device(self._config.device))

    def _build_trainer(self, callbacks: Sequence[Callback]) -> Trainer:
        config = self._config
        own: list[Callback] = [JsonlMetrics(self._directory / "metrics.jsonl"), Progress()]
        if config.tensorboard and TensorBoard.is_installed():
            own.append(TensorBoard(self._directory / "tensorboard"))
        store = CheckpointStore(
            self._directory / "checkpoints", config.train.keep_checkpoints, to_dict(config), self._report
        )
        batches = PackedBatches(
            self._train_shards,
            seq_len=config.data.seq_len,
            batch_size=config.data.batch_size,
            seed=config.seed,
            reset_documents=config.data.reset_documents,
        )
        return Trainer(
            model=self._model,
            optimizers=build_optimizers(self._model, config.optim),
            schedule=build_schedule(config.schedule),
            batches=batches,
            config=config.train,
            callbacks=[*own, *callbacks],
            evaluate=None if self._held_out is None else self._evaluate,
            after_step=[self._model.update_router_bias],
            store=store,
        )

    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        every = max(1, len(self._validation_batches(every=1)) // self._config.evaluation.batches)
        return {"bits_per_byte": _measure(model, self._validation_batches(every))}

    def _validation_batches(self, every: int) -> ValidationBatches:
        assert self._held_out is not None
        seq_len = self._config.evaluation.seq_len or self._config.data.seq_len
        batch_size = self._config.evaluation.batch_size
        return ValidationBatches(self._held_out, seq_len=seq_len, batch_size=batch_size, every=every)

    def _result(self, fit: FitResult, metrics: dict[str, float]) -> RunResult:
        return RunResult(
            run_dir=str(self._directory),
            model_dir=str(self._directory / "model"),
            status=fit.status,
            step=fit.step,
            tokens=fit.tokens,
            seconds=fit.seconds,
            metrics=metrics,
            precision=dataclasses.asdict(self.trainer.precision),
            max_steps=self._config.train.max_steps,
            max_minutes=self._config.train.max_minutes,
        )


def _measure(model: nn.Module, batches: ValidationBatches) -> float:
    return bits_per_byte(model, ((b.input_ids, b.cu_seqlens, b.labels, b.num_bytes) for b in batches))


def _prepare_data(
    directory: Path, config: RunConfig, report: Report
) -> tuple[Tokenizer, TokenShards, TokenShards | None]:
    """Return tokenizer, training shards and held-out shards. Once prepared, a run never looks at its source again."""
    data = directory / "data"
    if not (data / "prepared.json").exists():
        report(f"preparing {config.data.location}")
        has_validation = _write_data(directory, config, report)
        _write_json(data / "prepared.json", {"validation": has_validation})
    has_validation = read_json(data / "prepared.json")["validation"]
    held_out = TokenShards(data / "validation") if has_validation else None
    return Tokenizer.load(directory), TokenShards(data / "train"), held_out


def _write_data(directory: Path, config: RunConfig, report: Report) -> bool:
    """Write tokenizer and shards; return whether there is held-out text."""
    options = config.data
    training = TextSource(options.location, "all" if options.validation else "train", options.text_field)
    held_out = TextSource(
        options.validation or options.location, "all" if options.validation else "validation", options.text_field
    )
    if options.tokenizer is not None:
        tokenizer = Tokenizer.load(options.tokenizer)
    else:
        tokenizer = Tokenizer.train(training, vocab_size=config.network().vocab_size)
    tokenizer.save(directory)
    for name, source in (("train", training), ("validation", held_out)):
        try:
            with tqdm(desc=name, unit="B", unit_scale=True, disable=None, leave=False) as bar:
                prepare_shards(directory / "data" / name, source, tokenizer, progress=bar.update)
        except EmptySplitError as error:
            if name == "train":
                raise
            report(f"training without evaluation: {error}")
            return False
    return True


def _check_and_write_config(directory: Path, config: RunConfig) -> None:
    path = directory / "config.json"
    plain = to_dict(config)
    if path.exists():
        require_same(read_json(path), plain, resumable_with(config))
    _write_json(path, plain)


def _finished(directory: Path, config: RunConfig) -> RunResult | None:
    """Return the result of a run that used the budget asked for now."""
    path = directory / "result.json"
    if not path.exists():
        return None
    result = from_dict(RunResult, read_json(path), str(path))
    if (result.max_steps, result.max_minutes) != (config.train.max_steps, config.train.max_minutes):
        return None
    return dataclasses.replace(result, run_dir=str(directory), model_dir=str(directory / "model"))


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep other processes out of the directory; a killed process lets go by itself."""
    with explain_write_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        handle = (directory / ".lock").open("w")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"{directory} is in use by another process; wait for it or choose another.") from error
        yield


def _write_json(path: Path, value: Any) -> None:
    with explain_write_errors(path), atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _device(name: str) -> torch.device:
    try:
        # A tensor, because a device that does not exist can be named without complaint.
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f'device is {name!r}, which cannot be used here; try "cpu" or "cuda".') from error


def _laid_over(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `over`, objects within objects merged."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _laid_over(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
