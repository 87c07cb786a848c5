"""`kimi-linear plan`."""

import typer


def plan(
    model: str = typer.Argument(help="A preset, a checkpoint directory, or a hub name in the local cache."),
    context: str = typer.Option("4k", help="Tokens remembered of each sequence: 4096, 128k, 1M."),
    batch: int = typer.Option(1, help="Sequences at a time."),
    dtype: str = typer.Option("bfloat16", help="Of weights and caches."),
    bandwidth: float | None = typer.Option(None, help="GB/s of the machine's memory; default: measured here."),
) -> None:
    """Say what serving a model takes: bytes of weights and caches beside full attention, and the bound on a step."""
    from kimi_linear.recipes.plan import make_plan, named_config, parse_count, table

    made = make_plan(named_config(model), parse_count(context), batch, dtype)
    if bandwidth is None:
        from kimi_linear.recipes.bench.ceilings import Memory

        bandwidth = Memory().read(0.3)
    for line in table(made, 1e9 * bandwidth):
        typer.echo(line)
