"""Generation for a batch of prompts: one prefill, then one token a row and step, from a cache.

Rows are independent: each has its own draws, text and end. A row that ends leaves the batch at once (the cache keeps
the other rows), so a batch costs no more than its rows need. Letters: B rows, T prompt tokens, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kimi_linear.base.errors import ConfigError, StateError
from kimi_linear.inference.prompts import PromptIds, pad_left, read_prompts
from kimi_linear.inference.sampler import RowGenerator, SamplingParams, sample
from kimi_linear.inference.text import RowText, TokenDecoder
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.models.kimi_linear.model import KimiLinearLM
from kimi_linear.nn.state import Cache

# "stop": a stop token or a stop string. "length": max_new_tokens, or the model's context is full.
FinishReason = Literal["stop", "length"]

# The released model ends a turn with <|im_end|> (its configuration's eos) and a text with [EOS] (its tokenizer's) or
# [EOT]; it may produce any of them.
RELEASED_VOCAB_SIZE = 163840
RELEASED_END_TOKENS = (163585, 163586, 163593)


@dataclass(frozen=True)
class TokenEvent:
    """One new token of one row.

    Fields: `row`, its place in the prompts; `token_id`; `text`, whole characters that are now certain (often "", and
    always "" without a tokenizer); `finish_reason`, None until the row's last token.
    """

    row: int
    token_id: int
    text: str
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class GenerateOutput:
    """What was generated, one entry a row.

    Fields: `ids`, the new tokens, a stop token included; `finish_reasons`; `texts`, up to the first stop string and
    without the stop token, or None without a tokenizer.
    """

    ids: tuple[tuple[int, ...], ...]
    finish_reasons: tuple[FinishReason, ...]
    texts: tuple[str, ...] | None


def end_tokens(config: KimiLinearConfig) -> tuple[int, ...]:
    """Return the tokens that end a text of this model, by its configuration.

    Example:
        >>> from kimi_linear.models.kimi_linear.presets import preset
        >>> end_tokens(preset("48b-a3b"))
        (163585, 163586, 163593)
    """
    if config.vocab_size == RELEASED_VOCAB_SIZE and config.eos_token_id in RELEASED_END_TOKENS:
        return RELEASED_END_TOKENS
    return () if config.eos_token_id is None else (config.eos_token_id,)


def generate(
    model: KimiLinearLM,
    input_ids: PromptIds,
    params: SamplingParams,
    *,
    attention_mask: Tensor | None = None,
    tokenizer: TokenDecoder | None = None,
    cache: Cache | None = None,
    prefill_chunk: int | None = None,
) -> GenerateOutput:
    """Generate until every row has ended; exactly what `stream` yields, collected. Arguments and errors are its own.

    Example:
        >>> from kimi_linear.models.kimi_linear.presets import preset
        >>> model = KimiLinearLM(preset("tiny"))
        >>> len(generate(model, [[1, 2, 3]], SamplingParams(max_new_tokens=4)).ids[0])
        4
    """
    by_row: dict[int, list[TokenEvent]] = {}
    events = stream(
        model,
        input_ids,
        params,
        attention_mask=attention_mask,
        tokenizer=tokenizer,
        cache=cache,
        prefill_chunk=prefill_chunk,
    )
    for event in events:
        by_row.setdefault(event.row, []).append(event)
    rows = [by_row[index] for index in sorted(by_row)]
    texts = tuple("".join(event.text for event in row) for row in rows)
    return GenerateOutput(
        ids=tuple(tuple(event.token_id for event in row) for row in rows),
        finish_reasons=tuple(row[-1].finish_reason or "length" for row in rows),
        texts=None if tokenizer is None else texts,
    )


def stream(
    model: KimiLinearLM,
    input_ids: PromptIds,
    params: SamplingParams,
    *,
    attention_mask: Tensor | None = None,
    tokenizer: TokenDecoder | None = None,
    cache: Cache | None = None,
    prefill_chunk: int | None = None,
) -> Iterator[TokenEvent]:
    """Yield every token as it is picked: step by step, and within a step row by row.

    Arguments are checked at the call; the prompt is read when the first event is asked for. Stop asking to stop.

    Args:
        model: Runs without gradients and in evaluation mode; its mode is as before between events.
        input_ids: Prompts [B, T] or [T], or lists of tokens that may differ in length.
        params: How to pick tokens and when to stop.
        attention_mask: [B, T], 1 at tokens and 0 at padding (left or right); only with a tensor of prompts.
        tokenizer: Turns tokens into text; needed for stop strings. `tokenizers.Tokenizer` will do.
        cache: Continue from it: the prompts follow what its rows have seen. A cache of one row holds the prompt and
            every new token but the last afterwards; one of several rows stops where the first row ends. A repetition
            penalty does not know which tokens it has seen.
        prefill_chunk: Read the prompt in pieces of this many tokens, to bound memory. The result is the same up to
            rounding.

    Raises:
        ShapeError: The prompts are not rows of tokens, or the mask does not fit.
        StateError: The cache has another number of rows.
        ConfigError: Stop strings without a tokenizer, a prompt that leaves no room in the model's context, or a
            prefill_chunk below 1.
        KimiLinearError: A token outside the vocabulary; while running, logits that are not finite.

    Numerics: rows are picked from float64 logits independently of their neighbours; the logits themselves may differ
        in the last bits between batch sizes, as matrix products do.
    Cost: one forward pass over the prompt, and one of one token a row for each further token.
    """
    rows = read_prompts(input_ids, attention_mask, model.config.vocab_size)
    if cache is not None and cache.batch_size != len(rows):
        raise StateError(f"generate: the cache has {cache.batch_size} rows, the prompts {len(rows)}; make one to fit.")
    if prefill_chunk is not None and (not isinstance(prefill_chunk, int) or prefill_chunk < 1):
        raise ConfigError(f"generate: prefill_chunk is {prefill_chunk!r}, expected a whole number >= 1, or None.")
    if params.stop and tokenizer is None:
        raise ConfigError("generate: stop strings need a tokenizer to turn tokens into text; pass one.")
    cache = model.new_cache(len(rows)) if cache is None else cache
    budgets = _budgets(rows, cache, params.max_new_tokens, model.config.max_length)
    stop_ids = frozenset(end_tokens(model.config) if params.stop_token_ids is None else params.stop_token_ids)
    active = [_Row(row, budget, stop_ids, RowText(tokenizer, params.stop)) for row, budget in enumerate(budgets)]
    return _steps(_Decoder(model, cache), rows, active, params, prefill_chunk)


def _budgets(rows: list[list[int]], cache: Cache, max_new_tokens: int, max_length: int) -> list[int]:
    """Return how many tokens each row may get."""
    budgets = []
    for index, (row, seen) in enumerate(zip(rows, cache.lengths.tolist(), strict=True)):
        room = max_length - seen - len(row)
        if room < 1:
            after = f" after {seen} in the cache" if seen else ""
            raise ConfigError(
                f"generate: prompt {index} has {len(row)} tokens{after}, which leaves no room for a new one in the "
                f"model's context of {max_length}; shorten it."
            )
        budgets.append(min(room, max_new_tokens))
    return budgets


class _Row:
    """One row on its way: how much it may still get, and its text."""

    def __init__(self, row: int, budget: int, stop_ids: frozenset[int], text: RowText) -> None:
        self.row = row
        self.is_finished = False
        self._budget = budget
        self._stop_ids = stop_ids
        self._text = text

    def accept(self, token_id: int) -> TokenEvent:
        """Take the next token; sets `is_finished` with the last one."""
        self._budget -= 1
        is_stop = token_id in self._stop_ids
        text = "" if is_stop else self._text.push(token_id)
        self.is_finished = is_stop or self._text.stopped or self._budget == 0
        if not self.is_finished:
            return TokenEvent(self.row, token_id, text, None)
        text += self._text.finish()
        return TokenEvent(self.row, token_id, text, "stop" if is_stop or self._text.stopped else "length")


class _Decoder:
    """A model with its cache, for the rows still in the batch."""

    def __init__(self, model: KimiLinearLM, cache: Cache) -> None:
        self.device = model.model.embed_tokens.weight.device
        self._model = model
        self._cache = cache

    def prefill(self, rows: list[list[int]], chunk: int | None) -> Tensor:
        """Read the prompts and return the logits [B, V] behind their last tokens."""
        # Padding on the left puts every row's last token into the last column, whatever the chunks.
        ids, mask = (tensor.to(self.device) for tensor in pad_left(rows, fill=0))
        starts = range(0, ids.shape[1], chunk or ids.shape[1])
        for start in starts:
            part = slice(start, start + starts.step)
            is_padded = not bool(mask[:, part].all())
            logits = self._forward(ids[:, part], mask[:, part] if is_padded else None)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token [B] a row and return the logits [B, V] behind it."""
        return self._forward(tokens[:, None], None)

    def keep(self, indices: Tensor) -> None:
        """Drop the other rows of the cache. A cache that came from outside stays as it is from here on."""
        self._cache = self._cache.select_rows(indices)

    @torch.no_grad()
    def _forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        was_training = self._model.training
        if was_training:
            self._model.eval()
        try:
            output = self._model(ids, cache=self._cache, attention_mask=mask, last_only=True)
        finally:
            if was_training:
                self._model.train()
        return output.logits[:, -1]


def _steps(
    decoder: _Decoder, prompts: list[list[int]], active: list[_Row], params: SamplingParams, chunk: int | None
) -> Iterator[TokenEvent]:
    generator = RowGenerator(params.seed, len(active))
    history = None if params.repetition_penalty == 1.0 else _history(prompts).to(decoder.device)
    logits = decoder.prefill(prompts, chunk)
    while True:
        tokens = sample(logits, history, params, generator)
        for row, token in zip(active, tokens.tolist(), strict=True):
            yield row.accept(token)
        kept = [index for index, row in enumerate(active) if not row.is_finished]
        if not kept:
            return
        if history is not None:
            history = torch.cat([history, tokens[:, None]], dim=1)
        if len(kept) < len(active):
            rows = torch.tensor(kept, device=tokens.device)
            decoder.keep(rows)
            generator.keep(kept)
            active = [active[index] for index in kept]
            tokens, history = tokens[rows], None if history is None else history[rows]
        logits = decoder.step(tokens)


def _history(prompts: list[list[int]]) -> Tensor:
    """Return the prompts [B, T] with -1 where a row has no token."""
    ids, mask = pad_left(prompts, fill=0)
    return ids.masked_fill(mask == 0, -1)
