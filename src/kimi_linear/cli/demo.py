"""`kimi-linear demo`."""

import typer

from kimi_linear.base.errors import ConfigError


def demo(
    directory: str = typer.Option("runs/demo", help="Where the run, the report and its plots go."),
    minutes: float = typer.Option(3.0, help="Training time."),
    seed: int = typer.Option(0, help="Seed of weights, data order and samples."),
) -> None:
    """Train a small hybrid on real text, generate, compare with full attention, write a report.

    Running it again skips what is done.
    """
    if not minutes > 0:
        raise ConfigError(f"--minutes is {minutes:g}, expected more than 0.")
    # Loading torch takes seconds; --help should not.
    from kimi_linear.recipes.demo import DemoConfig
    from kimi_linear.recipes.demo import demo as run

    path = run(DemoConfig(directory=directory, minutes=minutes, seed=seed), say=typer.echo)
    typer.echo(f"\nreport: {path}")
