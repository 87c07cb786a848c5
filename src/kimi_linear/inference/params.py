"""How to pick the next token and when to stop: plain values, checked once. No torch."""

import math
from dataclasses import dataclass
from typing import Any

from kimi_linear.base.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to pick tokens, and when to stop. Every filter is off by default: plain sampling at temperature 1.

    Args:
        temperature: Divides the logits. 0 picks the most likely token (ties: the lowest id) and draws nothing.
        top_k: Keep the k most likely tokens; None keeps all.
        top_p: Keep the most likely tokens until their probability reaches this, the one that reaches it included.
        min_p: Drop tokens less likely than this times the most likely one.
        repetition_penalty: Above 1 makes tokens of the prompt and the text so far less likely; 1 is off.
        seed: Same seed, same text, on one machine and build. None draws one from torch's global generator.
        max_new_tokens: Most tokens generated for a row.
        stop_token_ids: Tokens that end a row; None means the model's own end tokens, () means none.
        stop: Strings that end a row; they need a tokenizer and are not part of the text.

    Raises:
        ConfigError: A value out of its range; names the field, the value and the range.

    Example:
        >>> SamplingParams(temperature=0.7, top_p=0.95, seed=1).top_p
        0.95
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_new_tokens: int = 128
    stop_token_ids: tuple[int, ...] | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0 <= _real(self.temperature) < math.inf, "a finite number >= 0")
        _number("top_p", self.top_p, 0 < _real(self.top_p) <= 1, "a number above 0 and at most 1")
        _number("min_p", self.min_p, 0 <= _real(self.min_p) <= 1, "a number from 0 to 1")
        in_range = 0.01 <= _real(self.repetition_penalty) <= 100
        _number("repetition_penalty", self.repetition_penalty, in_range, "a number from 0.01 to 100")
        _whole("top_k", self.top_k, least=1, optional=True)
        _whole("seed", self.seed, least=0, optional=True)
        _whole("max_new_tokens", self.max_new_tokens, least=1)
        # Frozen: lists, and a single string, become tuples here, so that equal settings compare equal.
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _stop_ids(self.stop_token_ids))


def _real(value: Any) -> float:
    """Return the value as a float, or NaN, which fails every range, for what is not a number."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number else math.nan


def _number(name: str, value: Any, in_range: bool, expected: str) -> None:
    if not in_range:
        raise ConfigError(f"{name} is {value!r}, expected {expected}.")


def _whole(name: str, value: Any, *, least: int, optional: bool = False) -> None:
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        none = ", or None" if optional else ""
        raise ConfigError(f"{name} is {value!r}, expected a whole number >= {least}{none}.")


def _stop_strings(stop: Any) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, (list, tuple)) or not all(isinstance(s, str) and s for s in strings):
        raise ConfigError(f"stop is {stop!r}, expected strings of at least one character.")
    return tuple(strings)


def _stop_ids(ids: Any) -> tuple[int, ...] | None:
    if ids is None:
        return None
    if not isinstance(ids, (list, tuple)):
        raise ConfigError(f"stop_token_ids is {ids!r}, expected a list of token ids, or None.")
    for token in ids:
        _whole("an entry of stop_token_ids", token, least=0)
    return tuple(ids)
