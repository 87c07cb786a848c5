import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kimi_linear.training.data import TextSource, Tokenizer, TokenShards, load_addresses, prepare_shards
from kimi_linear.training.data.corpus import Address

# Lengths from one token to several rows, a repeated document, and characters of one to four bytes.
DOCUMENTS = (
    "a",
    "To be, or not to be: that is the question.",
    "naïve café, 東京, 🙂🙂 and \u200d joiners",
    "one two three four five six seven eight nine ten eleven twelve " * 4,
    "To be, or not to be: that is the question.",
    "  two spaces,\ttab,\r\nnew line\n\n",
    "x",
)


@pytest.fixture(scope="session")
def addresses() -> tuple[Address, ...]:
    return load_addresses()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TextSource("sotu", split="validation"), vocab_size=512)


@pytest.fixture
def make_shards(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., TokenShards]:
    def make(documents: Sequence[str] = DOCUMENTS, name: str = "tokens", **options: Any) -> TokenShards:
        text = tmp_path / f"{name}.jsonl"
        text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
        return prepare_shards(tmp_path / name, TextSource(str(text)), tokenizer, **options)

    return make
