"""Checks of what lies beside the weights: tokenizer, chat template, end tokens."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kimi_linear.checkpoint.configs import GENERATION_NAME
from kimi_linear.checkpoint.save import VOCABULARIES
from kimi_linear.recipes.checkup.evidence import Evidence, optional_json
from kimi_linear.recipes.checkup.finding import ALL, LLAMA, MLX, OTHERS, SGLANG, TRANSFORMERS, VLLM, Finding

# What ends a turn or a text in this family.
_ENDS = ("<|im_end|>", "[EOS]", "[EOT]")
# Special slots that the family's Python tokenizer reserves behind the ranks, named or not.
_SLOTS = 258


def tokenizer(evidence: Evidence) -> Iterator[Finding]:
    """See whether there is one that everyone can read, and whether its ids fit the embedding."""
    directory, config = evidence.directory, evidence.config
    there = [name for name in VOCABULARIES if (directory / name).is_file()]
    if not there:
        text = f"there is no tokenizer ({' or '.join(VOCABULARIES)}): text cannot be read or written."
        yield Finding("tokenizer", "warning", text, ALL, "put the model's tokenizer beside its weights")
        return
    if there == ["tiktoken.model"]:
        text = "there is no tokenizer.json: engines read tiktoken.model with Python code from the checkpoint only."
        yield Finding("tokenizer", "warning", text, OTHERS, "add a tokenizer.json of the same vocabulary")
    _, broken = optional_json(directory / "tokenizer.json")
    if broken:
        yield Finding("tokenizer", "error", broken, ALL, "download it again")
    if config is None:
        return
    ids = {**_vocabulary(directory), **added_tokens(directory)}
    beyond = {text: token for text, token in ids.items() if token >= config.vocab_size}
    if beyond:
        name, token = max(beyond.items(), key=lambda item: item[1])
        text = (
            f"{len(beyond)} tokens lie beyond the {config.vocab_size} rows of the embedding, the last {name!r} {token}."
        )
        yield Finding("tokenizer", "error", text, ALL, "use the tokenizer that belongs to the weights")
        return
    ranks = _ranks(directory)
    if ranks and max(ranks) + 1 + _SLOTS > config.vocab_size:
        over = max(ranks) + 1 + _SLOTS - config.vocab_size
        text = f"the published tokenizer class reserves {over} ids beyond the embedding; they must not reach the model."
        yield Finding("tokenizer", "warning", text, (TRANSFORMERS, VLLM, SGLANG), "nothing, as long as none is used")


def chat_template(evidence: Evidence) -> Iterator[Finding]:
    """See whether there is a layout for conversations."""
    settings, _ = optional_json(evidence.directory / "tokenizer_config.json")
    if not (evidence.directory / "chat_template.jinja").is_file() and not (settings or {}).get("chat_template"):
        text = "there is no chat template (chat_template.jinja): chat endpoints refuse or guess."
        yield Finding("chat", "warning", text, ALL, "add the template the model was trained with, if it was for chats")


def stopping(evidence: Evidence) -> Iterator[Finding]:
    """See whether engines stop where the model ends."""
    generation, broken = optional_json(evidence.directory / GENERATION_NAME)
    if broken:
        yield Finding("stopping", "error", broken, (TRANSFORMERS, VLLM, SGLANG), "write it anew", fixable=True)
    elif generation is None:
        text = f"there is no {GENERATION_NAME}: engines stop at config.json's eos_token_id alone."
        yield Finding("stopping", "warning", text, (TRANSFORMERS, VLLM, SGLANG, MLX), "write one", fixable=True)
    wanted, stated = end_tokens(evidence), as_ids((generation or {}).get("eos_token_id"))
    if generation is not None and not wanted <= stated:
        text = (
            f"{GENERATION_NAME} stops at {sorted(stated)}, not at {sorted(wanted - stated)}, which end a text for "
            "config.json or the tokenizer."
        )
        yield Finding("stopping", "warning", text, (TRANSFORMERS, VLLM, SGLANG), "write all of them", fixable=True)
    configured, own = as_ids(evidence.given.get("eos_token_id")), tokenizer_end(evidence.directory)
    if configured and own is not None and own not in configured:
        text = (
            f"config.json ends a text with {sorted(configured)}, the tokenizer with {own}; llama.cpp takes the latter."
        )
        yield Finding("stopping", "warning", text, (LLAMA,), "give llama.cpp the other end tokens when it runs")


def end_tokens(evidence: Evidence) -> set[int]:
    """Return every token that ends a text: by config.json, by the tokenizer, and by its name."""
    added = added_tokens(evidence.directory)
    found = as_ids(evidence.given.get("eos_token_id")) | {added[name] for name in _ENDS if name in added}
    own = tokenizer_end(evidence.directory)
    limit = evidence.config.vocab_size if evidence.config is not None else None
    return {token for token in found | ({own} if own is not None else set()) if limit is None or token < limit}


def tokenizer_end(directory: Path) -> int | None:
    """Return the id of the tokenizer's own end token, if it says."""
    settings, _ = optional_json(directory / "tokenizer_config.json")
    name = (settings or {}).get("eos_token")
    name = name.get("content") if isinstance(name, dict) else name
    return {**_vocabulary(directory), **added_tokens(directory)}.get(str(name))


def as_ids(value: Any) -> set[int]:
    """Return a token, a list of them or nothing as a set."""
    values = value if isinstance(value, list) else [value]
    return {token for token in values if type(token) is int and token >= 0}


def added_tokens(directory: Path) -> dict[str, int]:
    """Return the special and added tokens that the tokenizer's files name."""
    settings, _ = optional_json(directory / "tokenizer_config.json")
    whole, _ = optional_json(directory / "tokenizer.json")
    found: dict[str, int] = {}
    entries = (settings or {}).get("added_tokens_decoder")
    for number, entry in (entries if isinstance(entries, dict) else {}).items():
        if str(number).isdecimal() and len(number) < 12 and isinstance(entry, Mapping):
            found[str(entry.get("content"))] = int(number)
    listed = (whole or {}).get("added_tokens")
    for entry in listed if isinstance(listed, list) else []:
        if isinstance(entry, Mapping) and type(entry.get("id")) is int:
            found[str(entry.get("content"))] = entry["id"]
    return found


def _vocabulary(directory: Path) -> dict[str, int]:
    whole, _ = optional_json(directory / "tokenizer.json")
    model = (whole or {}).get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    found = {str(text): token for text, token in vocab.items() if type(token) is int} if isinstance(vocab, dict) else {}
    return {**found, **{f"rank {rank}": rank for rank in _ranks(directory)}}


def _ranks(directory: Path) -> list[int]:
    """Return the ranks of tiktoken.model: lines of base64, a space, a number."""
    path = directory / "tiktoken.model"
    if not path.is_file():
        return []
    last = [line.rpartition(b" ")[2] for line in path.read_bytes().splitlines()]
    return [int(number) for number in last if number.isdigit() and len(number) < 12]
