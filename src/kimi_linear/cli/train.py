"""`kimi-linear train`."""

from pathlib import Path
from typing import Any

import typer

from kimi_linear.base.config import read_json
from kimi_linear.base.errors import ConfigError


def train(
    run_dir: str | None = typer.Option(None, help="Directory of the run (runs/train); an unfinished one goes on."),
    config: str | None = typer.Option(None, help="JSON file with a whole run configuration; flags go over it."),
    data: str | None = typer.Option(None, help='"sotu", or a .txt, .jsonl or .parquet file, or a directory of them.'),
    model: str | None = typer.Option(
        None, help="Preset: tiny, demo, 150m, 300m, 1b, ..., each also with -gdn and -mla."
    ),
    max_steps: int | None = typer.Option(None, help="Optimizer steps."),
    max_minutes: float | None = typer.Option(None, help="Wall time; the schedule follows it."),
    seq_len: int | None = typer.Option(None, help="Tokens a row."),
    batch_size: int | None = typer.Option(None, help="Rows a micro-batch."),
    accumulation: int | None = typer.Option(None, help="Micro-batches a step."),
    learning_rate: float | None = typer.Option(None, help="Peak learning rate."),
    optimizer: str | None = typer.Option(None, help="muon or adamw."),
    schedule: str | None = typer.Option(None, help="wsd or cosine."),
    precision: str | None = typer.Option(None, help="fp32, bf16 or auto (measured once)."),
    eval_every: int | None = typer.Option(None, help="Steps between evaluations."),
    checkpoint_every: int | None = typer.Option(None, help="Steps between checkpoints."),
    vocab_size: int | None = typer.Option(None, help="Tokens of the tokenizer and the model."),
    seed: int | None = typer.Option(None, help="Seed of weights and data order."),
    device: str | None = typer.Option(None, help="cpu, cuda, ..."),
    threads: int | None = typer.Option(None, help="CPU threads."),
    print_config: bool = typer.Option(False, help="Print the resolved configuration and stop."),
) -> None:
    """Train a model from text. Killed at any moment, the same command goes on from the last checkpoint."""
    given: dict[str, Any] = read_json(Path(config)) if config else {}
    flags: dict[str, dict[str, Any]] = {
        "": {"run_dir": run_dir, "model": model, "seed": seed, "device": device, "num_threads": threads},
        "data": {"location": data, "seq_len": seq_len, "batch_size": batch_size},
        "train": {
            "max_steps": max_steps,
            "max_minutes": max_minutes,
            "accumulation": accumulation,
            "precision": precision,
            "eval_every": eval_every,
            "checkpoint_every": checkpoint_every,
        },
        "optim": {"name": optimizer, "learning_rate": learning_rate},
        "schedule": {"name": schedule},
        "overrides": {"vocab_size": vocab_size},
    }
    plain = lay_flags(given, flags)
    plain.setdefault("run_dir", "runs/train")
    if not {"max_steps", "max_minutes"} & plain.setdefault("train", {}).keys():
        raise ConfigError("train: --max-steps and --max-minutes are both missing; give at least one.")
    # Loading torch takes seconds; --help should not.
    import json

    from kimi_linear.base.config import to_dict
    from kimi_linear.recipes.train import RunConfig
    from kimi_linear.recipes.train import train as run

    resolved = RunConfig.from_dict(plain)
    if print_config:
        typer.echo(json.dumps(to_dict(resolved.resolved()), indent=2))
        return
    result = run(resolved, report=typer.echo)
    figures = ", ".join(f"{name} {value:.4f}" for name, value in sorted(result.metrics.items()))
    typer.echo(f"{result.status}: {result.step} steps, {result.tokens:,} tokens, {figures}")
    if result.status == "finished":
        typer.echo(f"model: {result.model_dir}")


def lay_flags(given: dict[str, Any], flags: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return `given` with the flags that were set laid over it; "" holds the top level."""
    plain = dict(given)
    for part, values in flags.items():
        wanted = {name: value for name, value in values.items() if value is not None}
        if not wanted:
            continue
        if part == "":
            plain.update(wanted)
        else:
            below = plain.get(part, {})
            plain[part] = {**below, **wanted} if isinstance(below, dict) else below
    return plain
