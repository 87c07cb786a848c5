"""A tokenizer.json in GGUF's terms: tokens with their types, merges, and the name of the way text is cut."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_linear.base.config import read_json
from kimi_linear.base.errors import CheckpointError, ConfigError, DataError
from kimi_linear.text.tokenizer import Tokenizer

# Types of tokens.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
# llama.cpp insists on a merge; one whose result is no token changes nothing.
_NO_MERGE = '! "'


@dataclass(frozen=True)
class Vocabulary:
    """As llama.cpp has it: one token and one type a row of the embedding, merges "a b", and how text is cut first."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]


def read_vocabulary(directory: Path, size: int) -> Vocabulary | None:
    """Return the vocabulary beside a checkpoint, None where there is no tokenizer.

    Raises:
        CheckpointError: A tokenizer that cannot be written to GGUF; says why.
    """
    path = directory / "tokenizer.json"
    is_tiktoken = not path.is_file() and (directory / "tiktoken.model").is_file()
    if not path.is_file() and not is_tiktoken:
        return None
    try:
        given = json.loads(Tokenizer.load(directory, vocab_size=size).to_json()) if is_tiktoken else read_json(path)
        return from_tokenizer_json(given, size)
    except (CheckpointError, ConfigError, DataError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a tokenizer.json of the usual form ({error!r}).") from error


def from_tokenizer_json(given: Mapping[str, Any], size: int) -> Vocabulary:
    """Return the vocabulary of a parsed tokenizer.json for an embedding of `size` rows.

    Raises:
        CheckpointError: Not a byte-level BPE, text cut in a way that llama.cpp has no name for, or a token beyond the
            embedding.
    """
    model = given["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback") or given.get("normalizer"):
        raise CheckpointError(f"its model is {model.get('type')!r} or normalises text, expected a byte-level BPE.")
    tokens = [f"[UNUSED{token}]" for token in range(size)]
    types = [UNUSED] * size
    for text, token in model["vocab"].items():
        if token >= size:
            raise CheckpointError(
                f"token {text!r} has id {token}, expected one below the {size} rows of the embedding."
            )
        tokens[token], types[token] = text, NORMAL
    for added in given.get("added_tokens") or ():
        # Reserved slots may reach beyond the embedding; no text leads to them.
        if added["id"] < size:
            tokens[added["id"]] = added["content"]
            types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Vocabulary(_cut(given.get("pre_tokenizer")), tokens, types, merges or [_NO_MERGE])


def made_up(size: int) -> Vocabulary:
    """Return a vocabulary for prompts that are token ids: every token is its own number in brackets."""
    return Vocabulary("gpt-2", [f"[{token}]" for token in range(size)], [NORMAL] * size, [_NO_MERGE])


def _cut(pre_tokenizer: Mapping[str, Any] | None) -> str:
    """Return llama.cpp's name for the way a text is cut before merging."""
    steps = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step["type"] for step in steps]
    if any(step.get("add_prefix_space") for step in steps):
        raise CheckpointError("it puts a space before every text, which llama.cpp does not do for this model.")
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    # The released pattern is the only one of the family that treats Han characters apart.
    if kinds == ["Split", "ByteLevel"] and r"\p{Han}" in steps[0]["pattern"].get("Regex", ""):
        return "kimi-k2"
    raise CheckpointError(f"it cuts text by {kinds}, expected the pattern of GPT-2 or of the released tokenizer.")
