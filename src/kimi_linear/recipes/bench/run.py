"""One run of our own engine: check the operators, measure what was asked for between two readings of the ceilings."""

import datetime
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from kimi_linear.base.errors import BackendError, ConfigError
from kimi_linear.recipes.bench import ceilings, context, machine, memory, models, operators, selfcheck
from kimi_linear.recipes.bench.engine import named_config
from kimi_linear.recipes.bench.record import SCHEMA, Record, Row, line, save
from kimi_linear.recipes.bench.timing import FULL, QUICK, Effort

Say = Callable[[str], None]
PARTS = ("operators", "model", "context", "memory")
LAYER_EFFORT = Effort(rounds=5, turn_seconds=0.8, budget_seconds=30.0)


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is measured.

    Args:
        parts: Some of "operators", "model", "context", "memory".
        model: Preset of the model; its "-mla" and "-gqa" are what the long contexts are compared with.
        quick: A rough picture in about two minutes.
        threads: Threads of everything; default: torch's own choice.
        output: Folder of the record, `<machine>.json`.
    """

    parts: tuple[str, ...] = PARTS
    model: str = "300m"
    quick: bool = False
    threads: int | None = None
    output: str = "runs/bench"


def sections(config: BenchConfig) -> Iterator[Row]:
    """Yield the rows of every part, in order."""
    effort = QUICK if config.quick else FULL
    network = named_config(config.model)
    if "operators" in config.parts:
        for rows in operators.sweep(config.quick, effort):
            yield from rows
        yield from operators.decode_rows(effort)
    if "model" in config.parts:
        yield from models.measure(network, config.quick, effort)
        for weights in ("bfloat16", "float32"):
            yield from models.measure_layer(network, weights, models.layer_lengths(config.quick), LAYER_EFFORT)
    if "context" in config.parts:
        yield from context.measure(config.model, context.contexts(config.quick))
    if "memory" in config.parts:
        yield from memory.rows(config.model, config.quick)


def bench(config: BenchConfig, *, say: Say = print) -> Path:
    """Measure and write the record; return its path.

    Args:
        config: What to measure.
        say: Takes one line of progress a measurement.

    Raises:
        ConfigError: An unknown part or model, or less than one thread.
        BackendError: The operators disagree with the reference here: nothing is measured.
    """
    if unknown := sorted(set(config.parts) - set(PARTS)):
        raise ConfigError(f"bench knows no {unknown[0]!r}; choose from {', '.join(PARTS)}.")
    if config.threads is not None:
        if config.threads < 1:
            raise ConfigError(f"threads is {config.threads}, expected at least 1.")
        torch.set_num_threads(config.threads)
    about = machine.describe()
    if about["load"] > about["cores"] / 2:
        say(f"this machine is busy (load {about['load']}): do not publish what follows")
    say("checking the operators against the reference")
    if wrong := selfcheck.problems():
        raise BackendError("nothing measured: the operators are wrong here.\n" + "\n".join(wrong))
    seconds = 0.2 if config.quick else 1.0
    before = ceilings.measure(seconds)
    rows = []
    for row in sections(config):
        made = row.as_dict()
        rows.append(made)
        say(line(made, before))
    record = finish(about, before, ceilings.measure(seconds), rows, quick=config.quick, model=config.model)
    path = Path(config.output) / f"{about['machine']}.json"
    save(record, path)
    return path


def finish(
    about: Record, before: dict[str, float], after: dict[str, float], rows: list[Record], **given: object
) -> Record:
    """Return the record of a run; a ceiling is the better of its two readings."""
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **given,
        "machine": about,
        "ceilings": {name: round(rate, 2) for name, rate in ceilings.better(before, after).items()},
        "rows": rows,
    }
