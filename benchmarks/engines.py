"""The whole model, ours beside other engines: one checkpoint with random weights, read by all of them.

Every engine has a process of its own that holds the model; they take turns. Before that, the logits of all of them on a
short prompt are compared: nothing is timed on a model that is not the same one.
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kimi_linear import KimiLinearForCausalLM, preset
from kimi_linear.checkpoint.gguf.export import GGUFType, export_gguf
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.recipes.bench.ceilings import Memory
from kimi_linear.recipes.bench.engine import build, named_config
from kimi_linear.recipes.bench.models import READ_SECONDS, Work, rate_row, works
from kimi_linear.recipes.bench.record import Row
from peers import Peers
from processes import Worker, WorkerError

SCRIPT = "engine_worker.py"
OURS, TRANSFORMERS, LLAMA, XLLAMA = "kimi-linear", "transformers", "llama.cpp", "xllamacpp"
GGUF_KINDS: dict[str, GGUFType] = {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0", "int4": "q4_0"}
PROMPT = 48
CONTEXT = 8192
# Part of the free memory for an engine that runs while no other does.
ALONE = 0.9
# Relative RMS of the logits in float32. llama.cpp uses another epsilon in the latent's norm and in the unit queries and
# keys, and keeps latents in 16 bits.
AGREEMENT = {TRANSFORMERS: 1e-4, LLAMA: 1e-3, XLLAMA: 1e-3}


@dataclass(frozen=True)
class Settings:
    """How long a measurement may take."""

    rounds: int
    # An engine that has used this much has no further turns.
    budget_seconds: float
    call_seconds: float
    # What the slowest engine is given instead of the work of the others: tokens generated, tokens of a training step.
    slow_steps: int
    slow_training: int


FULL = Settings(rounds=3, budget_seconds=12.0, call_seconds=180.0, slow_steps=12, slow_training=1024)
QUICK = Settings(rounds=2, budget_seconds=4.0, call_seconds=60.0, slow_steps=4, slow_training=64)


@dataclass(frozen=True)
class Models:
    """The checkpoint directory, and the stem of the GGUF files beside it ("" without llama.cpp)."""

    checkpoint: Path
    gguf: str
    config: KimiLinearConfig


def perturb(model: KimiLinearForCausalLM) -> None:
    """Move what a fresh model has at one or zero, in place: a norm's weight left out would not show otherwise."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "correction_bias" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def write_models(name: str, folder: Path, kinds: Sequence[GGUFType]) -> Models:
    """Write the checkpoint of a preset with random weights, and its GGUF files of some types."""
    checkpoint, stem = folder / "checkpoint", str(folder / "model")
    model = build(preset(name))
    perturb(model)
    model.save_pretrained(checkpoint)
    for kind in kinds:
        export_gguf(checkpoint, f"{stem}-{kind}.gguf", kind)
    return Models(checkpoint, stem if kinds else "", named_config(name))


def start(engine: str, models: Models, weights: str | None, peers: Peers, share: float = 2 / 3) -> Worker:
    """Return the process of an engine that holds the model; it must be entered."""
    python = Path(sys.executable) if engine == OURS else peers.python
    if python is None:
        raise WorkerError(f"not installed: {peers.reason}")
    if engine == LLAMA and peers.native_reason:
        raise WorkerError(f"not installed: {peers.native_reason}")
    given = {"engine": engine, "checkpoint": str(models.checkpoint), "gguf": models.gguf, "weights": weights}
    return Worker(
        SCRIPT,
        {**given, "context": CONTEXT, "vocab_size": models.config.vocab_size},
        python,
        # What transformers frees between layers would add up to more than there is.
        keep=engine != TRANSFORMERS,
        share=share,
    )


def logits_of(engine: str, models: Models, peers: Peers, folder: Path, tokens: int) -> np.ndarray:
    """Return what an engine says about the logits of the short prompt, in float32."""
    with start(engine, models, "float32", peers) as worker:
        worker.ask(120.0, do="logits", path=str(folder / f"{engine}.npy"), tokens=tokens)
    return np.load(folder / f"{engine}.npy").astype(np.float64)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log probabilities of the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def agreement(engine: str, theirs: np.ndarray, ours: np.ndarray) -> dict[str, float]:
    """Return how far an engine's logits are from ours.

    Args:
        engine: Its name.
        theirs: [T', V] of the last positions, or for xllamacpp [5, 2]: token and log probability of the likeliest ones
            behind the prompt.
        ours: [T, V].
    """
    if engine == XLLAMA:
        tokens = theirs[:, 0].astype(int)
        ours, theirs = log_softmax(ours[-1])[tokens], theirs[:, 1]
        same, positions = (1.0 if ours.argmax() == theirs.argmax() else 0.0), 1
    else:
        ours = ours[-len(theirs) :]
        same, positions = float((ours.argmax(-1) == theirs.argmax(-1)).mean()), len(theirs)
    error = np.sqrt(np.square(theirs - ours).mean() / np.square(ours).mean())
    return {"relative_error": float(error), "same_first_choice": same, "positions": float(positions)}


def disagreements(models: Models, peers: Peers, tokens: int = PROMPT) -> tuple[list[str], dict[str, Any]]:
    """Compare every engine's logits with ours; return one sentence for each that differs, and the figures."""
    sentences: list[str] = []
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        ours = logits_of(OURS, models, peers, Path(name), tokens)
        for engine, limit in AGREEMENT.items():
            try:
                found[engine] = agreement(engine, logits_of(engine, models, peers, Path(name), tokens), ours)
            except WorkerError as error:
                found[engine] = {"reason": str(error)}
                continue
            if not found[engine]["relative_error"] <= limit:
                error = found[engine]["relative_error"]
                sentences.append(f"{engine} and kimi-linear differ in the logits by {error:.1e}, allowed {limit:.0e}")
    return sentences, found


def engines_of(work: Work) -> list[str]:
    """Return who takes part in a piece of work."""
    if work.section == "training":
        return [OURS, TRANSFORMERS]
    floats = work.weights in ("float32", "bfloat16")
    return [OURS, LLAMA, XLLAMA, *([TRANSFORMERS] if floats else [])]


def own_work(engine: str, work: Work, settings: Settings) -> Work:
    """Return the work as an engine is given it: less of it where it would take minutes."""
    if engine != TRANSFORMERS:
        return work
    if work.section == "training":
        return replace(work, batch=1, tokens=settings.slow_training)
    return replace(work, steps=min(work.steps, settings.slow_steps))


def request(work: Work) -> dict[str, Any]:
    """Return the command for a piece of work."""
    match work.section:
        case "prefill":
            return {"do": "prefill", "tokens": work.tokens}
        case "decode":
            return {"do": "decode", "tokens": work.tokens, "steps": work.steps}
    precision = "bf16" if work.weights == "bfloat16" else "fp32"
    return {"do": "train", "batch": work.batch, "tokens": work.tokens, "precision": precision}


class Group:
    """The engines that hold one kind of weights, and their turns at every piece of work for these."""

    def __init__(self, models: Models, peers: Peers, settings: Settings, stack: ExitStack) -> None:
        self.models, self.peers, self.settings, self.stack = models, peers, settings, stack
        self.workers: dict[str, Worker] = {}
        self.reasons: dict[str, str] = {}
        self._memory = Memory()
        # What the slow engine is given may be the same for different works.
        self._done: set[tuple[str, Work]] = set()

    def begin(self, engines: Sequence[str], weights: str | None) -> None:
        """Start the engines; one that cannot has a reason."""
        for engine in engines:
            try:
                worker = start(engine, self.models, weights, self.peers)
                self.workers[engine] = self.stack.enter_context(worker)
            except WorkerError as error:
                self.reasons[engine] = str(error)

    def _turn(self, engine: str, work: Work) -> float | None:
        try:
            return self.workers[engine].ask(self.settings.call_seconds, **request(work))
        except WorkerError as error:
            self.reasons[engine] = str(error)
            del self.workers[engine]
            return None

    def run(self, work: Work) -> list[Row]:
        """Return the rows of a piece of work: a first turn that is not counted, then rounds."""
        given = {engine: own_work(engine, work, self.settings) for engine in engines_of(work)}
        given = {engine: own for engine, own in given.items() if (engine, own) not in self._done}
        self._done.update(given.items())
        engines = list(given)
        seconds: dict[str, list[float]] = {engine: [] for engine in engines}
        rates: list[float] = []
        for number in range(1 + self.settings.rounds):
            rates.append(self._memory.read(READ_SECONDS))
            for engine in engines:
                if engine not in self.workers or sum(seconds[engine]) >= self.settings.budget_seconds:
                    continue
                taken = self._turn(engine, given[engine])
                # A first turn that uses up the budget is the measurement.
                if taken is not None and (number > 0 or taken >= self.settings.budget_seconds):
                    seconds[engine].append(taken)
        return [
            rate_row(
                given[engine],
                engine,
                self.models.config,
                seconds[engine],
                reason="" if seconds[engine] else self.reasons.get(engine, ""),
                version=self.workers[engine].about["version"] if engine in self.workers else "",
                read_rates=rates,
            )
            for engine in engines
        ]


def measure(models: Models, peers: Peers, settings: Settings, quick: bool) -> Iterator[Row]:
    """Yield the rows of every piece of work, one kind of weights at a time."""
    groups: dict[str, list[Work]] = {}
    for work in works(quick):
        groups.setdefault("" if work.section == "training" else work.weights, []).append(work)
    for weights, own in groups.items():
        with ExitStack() as stack:
            group = Group(models, peers, settings, stack)
            group.begin(engines_of(own[0]), weights or None)
            for work in own:
                yield from group.run(work)


def training_memory(models: Models, peers: Peers, tokens: int, timeout: float = 240.0) -> Row:
    """Return the row of the peak memory of a training step of transformers, or of what it did not fit into."""
    row = Row("memory", TRANSFORMERS, {"tokens": tokens, "arithmetic": "fp32", "recompute": False}, "GiB")
    try:
        with start(TRANSFORMERS, models, None, peers, share=ALONE) as worker:
            row.version = worker.about["version"]
            limit = worker.limit
            try:
                peak = worker.ask(timeout, do="training_peak", batch=1, tokens=tokens, precision="fp32")
                row.values = [peak / 2**30]
            except WorkerError as error:
                row.reason = str(error)
                if "out of memory" in row.reason:
                    row.extra["more_than_gib"] = limit / 2**30
    except WorkerError as error:
        row.reason = str(error)
    return row
