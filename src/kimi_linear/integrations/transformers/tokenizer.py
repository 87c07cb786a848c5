"""Tokenizers of our checkpoints for transformers: a tokenizer.json alone names no special tokens, config.json does."""

import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kimi_linear.text.chat import ChatTemplate
from kimi_linear.text.files import write_tokenizer_files
from kimi_linear.text.tokenizer import Tokenizer


class KimiLinearTokenizer(PreTrainedTokenizerFast):
    """What AutoTokenizer makes of our own model type; loading gives a plain PreTrainedTokenizerFast."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> PreTrainedTokenizerBase:
        """Return the tokenizer of a directory; special tokens it does not name are those of config.json."""
        kwargs.pop("_from_auto", None)
        config = AutoConfig.from_pretrained(pretrained_model_name_or_path, local_files_only=True)
        directory = Path(pretrained_model_name_or_path)
        if (directory / "tiktoken.model").is_file() and not (directory / "tokenizer.json").is_file():
            tokenizer = _from_tiktoken(directory, config.vocab_size, *args, **kwargs)
        else:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        for name in ("bos", "eos", "pad"):
            token_id = getattr(config, f"{name}_token_id")
            if getattr(tokenizer, f"{name}_token") is None and token_id is not None:
                setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(token_id))
        return tokenizer


def _from_tiktoken(directory: Path, vocab_size: int, *args: Any, **kwargs: Any) -> PreTrainedTokenizerBase:
    ours = Tokenizer.load(directory, vocab_size=vocab_size)
    with tempfile.TemporaryDirectory() as made:
        write_tokenizer_files(ours, ChatTemplate.load(directory), made)
        return PreTrainedTokenizerFast.from_pretrained(made, *args, **kwargs)


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Return a tokenizer of ours as transformers wants one, with its eos token for padding too.

    Unlike ours it reads special tokens written in a text as such; pass split_special_tokens=True for text from outside.

    Example:
        >>> from kimi_linear.text.tokenizer import Tokenizer
        >>> wrapped = wrap_tokenizer(Tokenizer.train(["to be or not to be"], vocab_size=260))
        >>> wrapped.decode(wrapped("not to be").input_ids)
        'not to be'
    """
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "tokenizer.json"
        tokenizer.save(file)
        return PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token=tokenizer.eos, pad_token=tokenizer.eos)
