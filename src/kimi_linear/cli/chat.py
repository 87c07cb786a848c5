"""`kimi-linear chat`."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import typer

if TYPE_CHECKING:
    from kimi_linear.causal_lm import KimiLinearForCausalLM
    from kimi_linear.inference.params import SamplingParams
    from kimi_linear.text.chat import ChatTemplate
    from kimi_linear.text.tokenizer import Tokenizer

HELP = "Commands: /system TEXT, /reset, /quit."


def chat(
    model: str = typer.Argument(help="Checkpoint directory of a chat model, with its tokenizer."),
    message: str | None = typer.Option(None, help="Answer this one message and end."),
    system: str | None = typer.Option(None, help="What the model is told first; default: nothing."),
    max_new_tokens: int = typer.Option(1024, help="Most tokens of an answer."),
    temperature: float = typer.Option(0.7, help="0 picks the most likely token."),
    top_p: float = typer.Option(1.0, help="Keep the most likely tokens up to this probability."),
    seed: int | None = typer.Option(None, help="Same seed, same answers."),
    dtype: str | None = typer.Option(None, help="bfloat16, float32, ...; default: as stored."),
    device: str = typer.Option("cpu", help="cpu, cuda, ..."),
    weights: str | None = typer.Option(
        None, help="Pack the weights for speed on the CPU: float32, bfloat16, int8 or int4. Default: plain modules."
    ),
    stream_weights: bool = typer.Option(False, help="Leave the weights in their files: for more than memory holds."),
) -> None:
    """Talk with a model. Without a terminal every line of standard input is a message.

    /system TEXT tells the model something first, /reset forgets the conversation, /quit ends.
    """
    # Loading torch takes seconds; --help should not.
    from kimi_linear.causal_lm import load_model
    from kimi_linear.checkpoint.hub import resolve
    from kimi_linear.inference.params import SamplingParams
    from kimi_linear.ops.linear.packed import WeightFormat
    from kimi_linear.text.chat import ChatTemplate
    from kimi_linear.text.tokenizer import Tokenizer

    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    loaded = load_model(
        model,
        dtype=dtype,
        device=device,
        weights=cast(WeightFormat | None, weights),
        keep_weights=False,
        stream_weights=stream_weights,
    )
    tokenizer = Tokenizer.load(resolve(model), vocab_size=loaded.config.vocab_size)
    conversation = Conversation(loaded, tokenizer, ChatTemplate.load(resolve(model)), params)
    conversation.system = system
    if message is not None:
        _answer(conversation, message)
        return
    if sys.stdin.isatty():
        typer.echo(HELP)
    for line in _lines():
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            conversation.reset()
        elif command == "/system":
            conversation.system = rest.strip() or None
        elif line.startswith("/"):
            typer.echo(f"unknown command {command}. {HELP}", err=True)
        elif line.strip():
            _answer(conversation, line)


def _lines() -> Iterator[str]:
    """Yield what the user enters, line by line, until the end of input."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    while True:
        try:
            yield input("> ")
        except EOFError:
            typer.echo()
            return


def _answer(conversation: "Conversation", message: str) -> None:
    try:
        for text in conversation.send(message):
            typer.echo(text, nl=False)
            sys.stdout.flush()
    except KeyboardInterrupt:
        # At a terminal it ends the answer, not the conversation.
        if not sys.stdin.isatty():
            raise
    typer.echo()


class Conversation:
    """A model and what was said so far; the model's cache is used again while the text only grows."""

    def __init__(
        self,
        model: "KimiLinearForCausalLM",
        tokenizer: "Tokenizer",
        template: "ChatTemplate",
        params: "SamplingParams",
    ) -> None:
        self.system: str | None = None
        self._model = model
        self._tokenizer = tokenizer
        self._template = template
        self._params = replace(params, stop_token_ids=tuple({*model.end_token_ids, *tokenizer.end_ids}))
        self.reset()

    def reset(self) -> None:
        """Forget what was said, but not the system's text."""
        self._messages: list[dict[str, Any]] = []
        self._cache = self._model.new_cache(1)
        # The tokens that the cache has seen.
        self._seen: list[int] = []

    def send(self, message: str) -> Iterator[str]:
        """Yield the answer to a message as it comes; both are remembered, an answer that is broken off too."""
        from kimi_linear.text.replies import parse_reply

        self._messages.append({"role": "user", "content": message})
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        try:
            ids = self._template.apply([*first, *self._messages], self._tokenizer)
            self._forget_unless_begun(ids)
            events = self._model.stream(
                [ids[len(self._seen) :]], self._params, tokenizer=self._tokenizer, cache=self._cache
            )
        except ValueError:
            self._messages.pop()
            raise
        new: list[int] = []
        # Whatever breaks the answer off may leave the cache in the middle of a step.
        cache, self._cache, self._seen = self._cache, self._model.new_cache(1), []
        try:
            for event in events:
                new.append(event.token_id)
                yield event.text
            self._cache, self._seen = cache, [*ids, *new[:-1]]
        finally:
            reply = parse_reply(new, self._tokenizer)
            calls = {"tool_calls": list(reply.tool_calls)} if reply.tool_calls else {}
            self._messages.append({"role": "assistant", "content": reply.content, **calls})

    def _forget_unless_begun(self, ids: list[int]) -> None:
        """Start with a new cache unless it has seen a beginning of these tokens, and not all of them."""
        if len(self._seen) >= len(ids) or ids[: len(self._seen)] != self._seen:
            self._cache, self._seen = self._model.new_cache(1), []
