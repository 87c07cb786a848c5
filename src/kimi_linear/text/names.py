"""What the files beside a tokenizer say of its special tokens."""

from pathlib import Path
from typing import Any

from kimi_linear.base.config import read_json
from kimi_linear.base.errors import DataError

NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


def stated_names(directory: Path) -> dict[str, str]:
    """Return the text of the tokens that `tokenizer_config.json` names, by `NAMES`; none without the file.

    Raises:
        DataError: One is no text.
        ConfigError: The file is not JSON.
    """
    given = _read(directory / "tokenizer_config.json")
    found = {name: given[name] for name in NAMES if given.get(name) is not None}
    # Older files hold the token with its flags.
    found = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    for name, value in found.items():
        if not isinstance(value, str):
            raise DataError(f"{directory / 'tokenizer_config.json'}: {name} is {value!r}, expected a token's text.")
    return found


def stated_end_ids(directory: Path) -> list[int]:
    """Return the eos ids of `generation_config.json`, then of `config.json`; what is no id is left to their readers."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        given = _read(directory / name).get("eos_token_id")
        found += [id for id in (given if isinstance(given, list) else [given]) if type(id) is int]
    return found


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
