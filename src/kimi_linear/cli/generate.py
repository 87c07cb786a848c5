"""`kimi-linear generate`."""

import sys
from dataclasses import replace
from typing import cast

import typer

from kimi_linear.base.errors import ConfigError


def generate(
    model: str = typer.Argument(help="Checkpoint directory with its tokenizer, such as runs/demo/train/model."),
    prompt: str | None = typer.Option(None, help="Text to continue; default: standard input."),
    chat: bool = typer.Option(False, "--chat", help="Take the prompt as a user's message and print the answer."),
    max_new_tokens: int = typer.Option(128, help="Most tokens generated."),
    temperature: float = typer.Option(0.7, help="0 picks the most likely token."),
    top_k: int | None = typer.Option(None, help="Keep the k most likely tokens."),
    top_p: float = typer.Option(1.0, help="Keep the most likely tokens up to this probability."),
    min_p: float = typer.Option(0.0, help="Drop tokens less likely than this times the most likely one."),
    repetition_penalty: float = typer.Option(1.0, help="Above 1 avoids tokens already there."),
    stop: list[str] = typer.Option([], help="Text that ends the output; may be given several times."),  # noqa: B008
    seed: int | None = typer.Option(None, help="Same seed, same text."),
    dtype: str | None = typer.Option(None, help="bfloat16, float32, ...; default: as stored."),
    device: str = typer.Option("cpu", help="cpu, cuda, ..."),
    weights: str | None = typer.Option(
        None, help="Pack the weights for speed on the CPU: float32, bfloat16, int8 or int4. Default: plain modules."
    ),
    stream_weights: bool = typer.Option(False, help="Leave the weights in their files: for more than memory holds."),
) -> None:
    """Continue a text, printing it as it comes."""
    text = sys.stdin.read() if prompt is None else prompt
    if not text:
        raise ConfigError("the prompt is empty; give --prompt or text on standard input.")
    # Loading torch takes seconds; --help should not.
    from kimi_linear.causal_lm import load_model
    from kimi_linear.checkpoint.hub import resolve
    from kimi_linear.inference.params import SamplingParams
    from kimi_linear.ops.linear.packed import WeightFormat
    from kimi_linear.text.chat import ChatTemplate
    from kimi_linear.text.tokenizer import Tokenizer

    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop),
        seed=seed,
    )
    loaded = load_model(
        model,
        dtype=dtype,
        device=device,
        weights=cast(WeightFormat | None, weights),
        keep_weights=False,
        stream_weights=stream_weights,
    )
    tokenizer = Tokenizer.load(resolve(model), vocab_size=loaded.config.vocab_size)
    if chat:
        ids = ChatTemplate.load(resolve(model)).apply([{"role": "user", "content": text}], tokenizer)
    else:
        ids = [*tokenizer.begin_ids, *tokenizer.encode(text)]
        typer.echo(text, nl=False)
    ends = tuple({*loaded.end_token_ids, *tokenizer.end_ids})
    for event in loaded.stream([ids], replace(params, stop_token_ids=ends), tokenizer=tokenizer):
        typer.echo(event.text, nl=False)
        sys.stdout.flush()
    typer.echo()
