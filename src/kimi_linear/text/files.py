"""The files that give a checkpoint its tokenizer and chat layout, as transformers and other engines read them."""

import json
from pathlib import Path

from kimi_linear.base.files import atomic_file
from kimi_linear.base.writing import explain_write_errors
from kimi_linear.text.chat import TEMPLATE_NAME, ChatTemplate
from kimi_linear.text.tokenizer import Tokenizer


def write_tokenizer_files(
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    directory: str | Path,
    *,
    model_max_length: int | None = None,
) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into a directory, each whole or not at all.

    Args:
        tokenizer: The model's, limited to its rows.
        template: The chat layout; None for a model that does not chat.
        directory: The checkpoint; made if missing.
        model_max_length: Tokens of the model's context.

    Raises:
        DataError: They cannot be written (full disk, no permission).

    Example:
        >>> write_tokenizer_files(Tokenizer.train(["a"], vocab_size=257), ChatTemplate(), "checkpoint")
        >>> sorted(path.name for path in Path("checkpoint").iterdir())
        ['chat_template.jinja', 'tokenizer.json', 'tokenizer_config.json']
    """
    config: dict[str, object] = {
        # The name that every version of transformers knows for a tokenizer.json without code of its own.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokenizer.names,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.is_released_kind:
        # Without code of its own, a tiktoken.model in the directory has its control tokens from here.
        config["added_tokens_decoder"] = {
            str(id): {"content": text, "special": text in tokenizer.special_ids, "normalized": False}
            for text, id in tokenizer.control_ids.items()
        }
    if model_max_length is not None:
        config["model_max_length"] = model_max_length
    folder = Path(directory)
    tokenizer.save(folder)
    _write(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    if template is not None:
        _write(folder / TEMPLATE_NAME, template.source)


def _write(file: Path, text: str) -> None:
    with explain_write_errors(file), atomic_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
