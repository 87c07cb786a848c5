"""config.json and generation_config.json: the released model type where the model fits it, else a type of our own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kimi_linear.base.config import read_json
from kimi_linear.base.errors import CheckpointError, ConfigError
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.models.kimi_linear.release_config import from_release_config, to_release_config

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"
# For models the released type cannot hold: the whole configuration under our own keys.
OWN_TYPE = "kimi_linear_hybrid"

# What config.json of our own type holds beside the fields of the configuration.
_OWN_KEYS = ("architectures", "model_type", "dtype")


def model_json(config: KimiLinearConfig, dtype: str) -> dict[str, Any]:
    """Return the contents of config.json for a model whose tensors are `dtype` ("bfloat16", for instance).

    Example:
        >>> from kimi_linear.models.kimi_linear.presets import preset
        >>> model_json(preset("tiny"), "float32")["model_type"], model_json(preset("tiny-gdn"), "float32")["model_type"]
        ('kimi_linear', 'kimi_linear_hybrid')
    """
    try:
        return to_release_config(config, dtype)
    except ConfigError:
        own = {"architectures": ["KimiLinearForCausalLM"], "model_type": OWN_TYPE, "dtype": dtype}
        return {**own, **config.to_dict()}


def generation_json(config: KimiLinearConfig, end_token_ids: Sequence[int]) -> dict[str, Any]:
    """Return the contents of generation_config.json: the special tokens that there are."""
    tokens = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(end_token_ids) or None,
        "pad_token_id": config.pad_token_id,
    }
    return {name: value for name, value in tokens.items() if value is not None}


def read_model_json(directory: Path) -> KimiLinearConfig:
    """Return the configuration that a checkpoint's config.json describes.

    Raises:
        CheckpointError: It is missing, not JSON, of another model, or lacks or contradicts something; says what.
    """
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise CheckpointError(f"{directory} has no {CONFIG_NAME}; give the directory of a saved model.")
    try:
        config = read_config(read_json(path))
        # The shapes meet every size, so a size of the wrong type shows here and not in the middle of loading.
        config.shapes()
        return config
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (TypeError, AttributeError) as error:
        # A value of another JSON type than its field, wherever it is first used.
        raise CheckpointError(
            f"{path} holds a value of the wrong type ({error}); download or save it again."
        ) from error


def read_config(given: dict[str, Any]) -> KimiLinearConfig:
    """Return the configuration that the contents of a config.json describe, of the released type or of our own.

    Raises:
        ConfigError: They are of another model, or lack or contradict something; says what.
    """
    if given.get("model_type") != OWN_TYPE:
        return from_release_config(given)
    return KimiLinearConfig.from_dict({key: value for key, value in given.items() if key not in _OWN_KEYS})


def read_end_tokens(directory: Path) -> tuple[int, ...]:
    """Return the end tokens of generation_config.json, none if there is no such file.

    Raises:
        CheckpointError: It is not JSON, or eos_token_id is neither a token nor a list of tokens.
    """
    path = directory / GENERATION_NAME
    if not path.is_file():
        return ()
    try:
        given = read_json(path).get("eos_token_id")
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    tokens = [] if given is None else given if isinstance(given, list) else [given]
    if not all(type(token) is int and token >= 0 for token in tokens):
        raise CheckpointError(f"{path}: eos_token_id is {given!r}, expected a token id or a list of them.")
    return tuple(tokens)
