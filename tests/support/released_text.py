"""Small vocabularies in the released format, for tests of text and chat."""

import base64
import json
from functools import cache
from pathlib import Path

import tokenizers
from tokenizers import models, trainers

from kimi_linear.text import tiktoken
from kimi_linear.text.byte_level import byte_alphabet
from kimi_linear.text.tokenizer import Tokenizer

# The control tokens of the release by their place behind the ranks, and whether they are flagged as special.
CONTROL = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    9: "[EOT]",
    10: "<|im_system|>",
    11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>",
    13: "<|tool_call_begin|>",
    14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>",
    17: "<|im_middle|>",
    254: "[UNK]",
    255: "[PAD]",
}
NOT_SPECIAL = range(11, 16)

_TEXT = """It's the user's turn; the assistant can't wait, they'll say: "I've 1234 apples & 56.78 pears!"
    def function(arguments): return {"name": [1, 2, 3]}\r\n\r\n\t\tWe're HERE, IBM and McDonald, naïve café Ünïcode.
東京は日本の首都です。我们在北京学习中文。 Привет, мир! καλημέρα κόσμε שלום مرحبا ไทย हिन्दी 🙂🙂 👩‍👩‍👧 e\u0301
   \n   \n
"""


@cache
def learned_ranks(size: int = 700) -> dict[bytes, int]:
    """Return a vocabulary learned from a few lines of many scripts."""
    alphabet = byte_alphabet()
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = tiktoken._pre_tokenizer()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=list(alphabet), show_progress=False)
    backend.train_from_iterator([_TEXT] * 3, trainer)
    by_rank = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    return {bytes(alphabet[c] for c in token): rank for rank, (token, _) in enumerate(by_rank)}


def write_release(directory: Path, ranks: dict[bytes, int] | None = None) -> Path:
    """Write tiktoken.model and tokenizer_config.json as the release has them; return the directory."""
    ranks = ranks or learned_ranks()
    directory.mkdir(parents=True, exist_ok=True)
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    (directory / tiktoken.RANKS_NAME).write_bytes(b"".join(lines))
    named = {
        str(len(ranks) + place): {"content": text, "special": place not in NOT_SPECIAL}
        for place, text in CONTROL.items()
    }
    config = {"added_tokens_decoder": named, "bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]"}
    (directory / tiktoken.CONFIG_NAME).write_text(json.dumps(config))
    return directory


@cache
def released_tokenizer() -> Tokenizer:
    """Return a tokenizer of the released kind, limited to its first 256 control tokens as the model does it."""
    ranks = learned_ranks()
    slots = range(len(ranks), len(ranks) + 256)
    tokens = [
        tokenizers.AddedToken(
            CONTROL.get(id - len(ranks), f"<|reserved_token_{id}|>"),
            normalized=False,
            special=id - len(ranks) not in NOT_SPECIAL,
        )
        for id in slots
    ]
    return Tokenizer(tiktoken.build(ranks, tokens), "[EOS]")
