"""`kimi-linear`: gathers the commands; every error a user can cause is one sentence and exit code 2."""

import sys

import typer

from kimi_linear.base.errors import KimiLinearError
from kimi_linear.cli import bench, chat, compare, demo, doctor, export, generate, inspect, plan, train

app = typer.Typer(
    name="kimi-linear",
    help="Kimi Linear, end to end: train, generate, compare.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("demo")(demo.demo)
app.command("train")(train.train)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)
app.command("export")(export.export)
app.command("inspect")(inspect.inspect)
app.command("plan")(plan.plan)
app.command("compare")(compare.compare)


def _version(wanted: bool) -> None:
    if wanted:
        from kimi_linear import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Kimi Linear, end to end: train, generate, compare."""


def main() -> None:
    """Run the command line and exit: 0 done, 1 a check found errors, 2 bad input, 130 interrupted."""
    debug = "--debug" in sys.argv[1:]
    try:
        app()
    except KimiLinearError as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        if debug:
            raise
        # A full disk, a directory that may not be written: the operating system's own sentence, and the file.
        where = f": {error.filename}" if error.filename else ""
        typer.echo(f"error: {error.strerror or error}{where}.", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
