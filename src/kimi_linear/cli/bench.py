"""`kimi-linear bench`."""

import enum
from typing import Annotated

import typer


class Part(enum.StrEnum):
    """What can be measured."""

    OPERATORS = "operators"
    MODEL = "model"
    CONTEXT = "context"
    MEMORY = "memory"
    ALL = "all"


def bench(
    part: Annotated[Part, typer.Argument(help="What to measure.")] = Part.ALL,
    model: str = typer.Option("300m", help="Preset of the model; long contexts are compared with its -mla and -gqa."),
    quick: bool = typer.Option(False, "--quick", help="A rough picture in about two minutes."),
    threads: int | None = typer.Option(None, help="Threads of everything (default: all cores)."),
    output: str = typer.Option("runs/bench", help="Where the record goes."),
) -> None:
    """Measure speed and memory on this machine, each figure beside what the machine can do.

    The operators are checked against the reference first; nothing is measured if they are wrong.
    """
    # Loading torch takes seconds; --help should not.
    from kimi_linear.recipes.bench import PARTS, BenchConfig
    from kimi_linear.recipes.bench import bench as run

    parts = PARTS if part is Part.ALL else (part.value,)
    path = run(BenchConfig(parts=parts, model=model, quick=quick, threads=threads, output=output), say=typer.echo)
    typer.echo(f"\nrecord: {path}")
