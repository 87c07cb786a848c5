"""A model class for lm-eval over our model, our cache and our tokenizer."""

import os
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from kimi_linear.base.config import check_keys
from kimi_linear.base.errors import ConfigError
from kimi_linear.causal_lm import KimiLinearForCausalLM, load_model
from kimi_linear.checkpoint.hub import resolve
from kimi_linear.inference.generate import generate
from kimi_linear.inference.params import SamplingParams
from kimi_linear.integrations.lm_eval.scoring import Scored, score
from kimi_linear.ops.linear.packed import WeightFormat
from kimi_linear.text.tokenizer import Tokenizer


@register_model("kimi-linear")
class KimiLinearEvalLM(TemplateLM):
    """A Kimi Linear model that lm-eval can ask for likelihoods and texts.

    Documents of our training begin with the end-of-text token, and lm-eval's contexts with none. An empty context is
    the beginning of a document: the end-of-text token alone. Any other is read as the middle of one, unless
    `add_bos_token` puts the token in front. Figures with and without it differ, so state which it was.

    Args:
        pretrained: A model, or what `kimi_linear.load_model` takes.
        tokenizer: Ours; default: the one beside the checkpoint.
        batch_size: Sequences run together. The results of one do not depend on the others.
        max_length: Most tokens a prediction may follow from. Default: the model's.
        max_gen_toks: New tokens where a task does not say.
        add_bos_token: Put the end-of-text token in front of every context.
        dtype: Of the weights; default: as stored.
        device: Where a checkpoint's weights go.
        weights: Prepare the model for inference; see `KimiLinearForCausalLM.prepare_for_inference`.

    Raises:
        ConfigError: No tokenizer, one of another vocabulary, or a size out of its range.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | KimiLinearForCausalLM,
        tokenizer: Tokenizer | None = None,
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool = False,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        weights: WeightFormat | None = None,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, KimiLinearForCausalLM):
            self.model = pretrained
            if tokenizer is None:
                raise ConfigError("a model was given without a tokenizer; pass tokenizer=Tokenizer.load(...).")
        else:
            self.model = load_model(pretrained, dtype=dtype, device=device or "cpu", weights=weights)
            tokenizer = tokenizer or Tokenizer.load(resolve(pretrained), vocab_size=self.model.config.vocab_size)
        self.text = tokenizer
        if self.text.vocab_size > self.model.config.vocab_size:
            raise ConfigError(
                f"the tokenizer has {self.text.vocab_size} tokens, the model {self.model.config.vocab_size}; "
                "give the tokenizer of the model."
            )
        self.batch_size = _at_least_one("batch_size", batch_size)
        self.max_length = _at_least_one("max_length", max_length or self.model.config.max_length)
        self.max_gen_toks = _at_least_one("max_gen_toks", max_gen_toks)
        self.add_bos_token = add_bos_token

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token, which stands before every document too."""
        return self.text.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the tokens of a text, behind the end-of-text token if contexts are to begin with it."""
        starts = self.add_bos_token if add_special_tokens is None else add_special_tokens
        return [*([self.eot_token_id] if starts else []), *self.text.encode(string)]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._fitted(context, continuation) for _, context, continuation in requests]
        scores = self._score(pairs, disable_tqdm)
        return [(one.log_probability, one.is_greedy) for one in scores]

    def _fitted(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return a pair cut on the left to what the model may see."""
        if len(continuation) > self.max_length:
            raise ConfigError(
                f"a continuation has {len(continuation)} tokens, expected at most max_length = {self.max_length}; "
                "use a rolling task for long texts."
            )
        room = self.max_length + 1 - len(continuation)
        return tuple(context[-room:]), tuple(continuation)

    def _score(self, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], quiet: bool) -> list[Scored]:
        """Return the score of each pair; pairs of one context share its prefill, and the longest go first."""
        order = sorted(range(len(pairs)), key=lambda i: (-len(pairs[i][0]), pairs[i][0]))
        groups = [list(group) for _, group in groupby(order, key=lambda i: pairs[i][0])]
        found: list[Scored | None] = [None] * len(pairs)
        with tqdm(total=len(pairs), disable=quiet, desc="Running loglikelihood requests") as bar:
            for start in range(0, len(groups), self.batch_size):
                batch = groups[start : start + self.batch_size]
                contexts = [pairs[group[0]][0] for group in batch]
                scores = score(self.model, contexts, [[pairs[i][1] for i in group] for group in batch])
                for index, scored in zip([i for group in batch for i in group], scores, strict=True):
                    found[index] = scored
                bar.update(sum(map(len, batch)))
        return [scored for scored in found if scored is not None]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, in lm-eval's windows of `max_length` predictions.

        Its last window reaches back to the left until it is full, so it sees more context than that of
        `ValidationBatches`; where the windows come out even, the two agree.
        """
        texts = [self.text.encode(request.args[0]) for request in requests]
        windows = [self._windows(tokens) for tokens in texts]
        flat = [(tuple(context), tuple(predicted)) for own in windows for context, predicted in own]
        scores = iter(self._score(flat, disable_tqdm))
        return [sum(next(scores).log_probability for _ in own) for own in windows]

    def _windows(self, tokens: list[int]) -> list[tuple[list[int], list[int]]]:
        cut = get_rolling_token_windows(tokens, self.eot_token_id, self.max_length, context_len=1)
        return [make_disjoint_window(window) for window in cut]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what follows each context, up to the first of its stop strings."""
        order = sorted(range(len(requests)), key=lambda i: (repr(requests[i].args[1]), len(requests[i].args[0])))
        found: dict[int, str] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for _, group in groupby(order, key=lambda i: repr(requests[i].args[1])):
                indices = list(group)
                params = self._params(requests[indices[0]].args[1])
                for start in range(0, len(indices), self.batch_size):
                    batch = indices[start : start + self.batch_size]
                    found.update(zip(batch, self._texts([requests[i].args[0] for i in batch], params), strict=True))
                    bar.update(len(batch))
        return [found[index] for index in range(len(requests))]

    def _params(self, given: dict[str, Any]) -> SamplingParams:
        """Return our sampling parameters for a task's, by the names that lm-eval tasks use."""
        fields = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        if not fields.pop("do_sample"):
            fields["temperature"] = 0.0
        fields["stop"] = tuple(string for string in fields.pop("until") if string)
        fields["max_new_tokens"] = fields.pop("max_gen_toks")
        check_keys(SamplingParams, fields, "generation_kwargs")
        return SamplingParams(**{"stop_token_ids": self.model.end_token_ids, **fields})

    def _texts(self, contexts: Iterable[str], params: SamplingParams) -> tuple[str, ...]:
        room = self.max_length - params.max_new_tokens
        if room < 1:
            raise ConfigError(
                f"a task asks for {params.max_new_tokens} new tokens, which leaves no room in max_length = "
                f"{self.max_length}; lower max_gen_toks."
            )
        prompts = [self.tok_encode(context)[-room:] or [self.eot_token_id] for context in contexts]
        texts = generate(self.model, prompts, params, tokenizer=self.text).texts
        assert texts is not None
        return texts


def _at_least_one(name: str, value: int | str) -> int:
    number = int(value) if str(value).isdecimal() else 0
    if number < 1:
        raise ConfigError(f"{name} is {value!r}, expected a whole number of at least 1.")
    return number
