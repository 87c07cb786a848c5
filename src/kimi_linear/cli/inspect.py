"""`kimi-linear inspect`."""

import typer


def inspect(
    path: str = typer.Argument(help="A checkpoint directory, or a hub name in the local cache."),
) -> None:
    """Say what a checkpoint holds: network, layers drawn, tensors, layout, and what is odd. Reads no tensor."""
    from kimi_linear.recipes.inspect import inspect as look
    from kimi_linear.recipes.inspect import report

    for line in report(look(path)):
        typer.echo(line)
