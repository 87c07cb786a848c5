"""`kimi-linear export`."""

import typer


def export(
    source: str = typer.Argument(help="A checkpoint directory, a hub name in the local cache, or a .gguf file."),
    target: str = typer.Argument(help="The .gguf file, or the directory, to write."),
    format: str = typer.Option("gguf", help="gguf for llama.cpp, mlx for mlx-lm, release for everything else."),
    type: str | None = typer.Option(
        None, help="f32, bf16, and for gguf q8_0 or q4_0. Default: bf16 for gguf, as stored otherwise."
    ),
) -> None:
    """Write a checkpoint for another engine, tensor by tensor, with memory for one tensor."""
    from kimi_linear.recipes.export import export as write

    for line in write(source, target, format, type):
        typer.echo(line)
