"""`kimi-linear compare`."""

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

import typer

from kimi_linear.base.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from kimi_linear.recipes.compare import Engine


def compare(
    a: str = typer.Argument(help="PATH, reference:PATH (float64), transformers:PATH or llama.cpp:FILE.gguf."),
    b: str = typer.Argument(help="The same; differences are relative to A."),
    prompt: str | None = typer.Option(None, help="Text for both, through the tokenizer of A, else of B."),
    ids: str | None = typer.Option(None, help="Token ids for both, such as 1,2,3."),
    tokens: int = typer.Option(16, help="Tokens to generate greedily with A and to compare."),
    tolerance: float = typer.Option(1e-4, help="Relative difference of the residual stream that counts."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of text."),
) -> None:
    """Compare two checkpoints, or two engines, on the same tokens: layer by layer, scores, greedy tokens, weights."""
    if (prompt is None) == (ids is None):
        raise ConfigError("give the prompt as --prompt TEXT or as --ids 1,2,3, one of the two.")
    given = None if ids is None else _read_ids(ids)
    # Loading torch takes seconds; --help should not.
    from kimi_linear.integrations.engines import open_engine
    from kimi_linear.recipes.compare import compare as run
    from kimi_linear.recipes.compare import report

    engines = open_engine(a), open_engine(b)
    found = run(*engines, given or _encode(prompt or "", engines), steps=tokens, tolerance=tolerance)
    if not as_json:
        for line in report(found):
            typer.echo(line)
        return
    typer.echo(json.dumps(_finite({**dataclasses.asdict(found), "steps": found.steps}), indent=2))


def _read_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--ids is {text!r}, expected whole numbers with commas between, such as 1,2,3.") from error


def _encode(text: str, engines: "tuple[Engine, ...]") -> list[int]:
    from kimi_linear.checkpoint.save import VOCABULARIES
    from kimi_linear.text.tokenizer import Tokenizer

    for engine in engines:
        if engine.directory is not None and any((engine.directory / name).is_file() for name in VOCABULARIES):
            return Tokenizer.load(engine.directory).encode(text)
    raise CheckpointError("neither checkpoint has a tokenizer; give the prompt as --ids 1,2,3.")


def _finite(value: Any) -> Any:
    """Return plain values with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
