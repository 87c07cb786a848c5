"""config.json and generation_config.json: the released model type where the model fits it, else a type of our own."""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kimi_linear.base.config import read_json
from kimi_linear.base.errors import CheckpointError, ConfigError, shown
from kimi_linear.checkpoint.header import MAX_TENSORS
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.models.kimi_linear.release_config import from_release_config, to_release_config
from kimi_linear.nn.component import MAX_SIZE, ComponentConfig
from kimi_linear.nn.config import BlockConfig
from kimi_linear.nn.ffn import MoEConfig
from kimi_linear.nn.mixers import MLAConfig

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


def fits_release(config: KimiLinearConfig) -> bool:
    """Return whether the released type can hold a model."""
    return model_json(config, "float32")["model_type"] != OWN_TYPE


def generation_json(config: KimiLinearConfig, end_token_ids: Sequence[int]) -> dict[str, Any]:
    """Return the contents of generation_config.json: the special tokens that there are.

    No length is among them: a bound on what one call generates is the caller's.
    """
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
    if not os.path.exists(path):
        raise CheckpointError(f"{directory} has no {CONFIG_NAME}; give the directory of a saved model.")
    try:
        return read_config(read_json(path))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_config(given: dict[str, Any]) -> KimiLinearConfig:
    """Return the configuration that the contents of a config.json describe, of the released type or of our own.

    Raises:
        ConfigError: They are of another model, lack or contradict something, or describe more tensors than a checkpoint
            may have; says what.
    """
    if given.get("model_type") != OWN_TYPE:
        config = from_release_config(given)
    else:
        config = KimiLinearConfig.from_dict({key: value for key, value in given.items() if key not in _OWN_KEYS})
    ffns = [block.ffn for block in config.layer_blocks]
    experts = sum(ffn.num_experts for ffn in ffns if isinstance(ffn, MoEConfig))
    if 3 * experts + len(config.shapes()) > MAX_TENSORS:
        raise ConfigError(
            f"{experts} experts in {config.num_layers} layers are more tensors than the {MAX_TENSORS} that are read; "
            "check num_experts and num_hidden_layers."
        )
    return config


def with_switches(
    config: KimiLinearConfig, latent_norm_eps: float | None = None, biased_combine: bool = False
) -> KimiLinearConfig:
    """Return the configuration with what engines read differently in the same checkpoint.

    Args:
        config: As the checkpoint says.
        latent_norm_eps: Epsilon of latent attention's norm; None: as it is. The published code, transformers and this
            package take 1e-6; vLLM, SGLang, mlx-lm and llama.cpp take the model's rms_norm_eps (1e-5).
        biased_combine: Weigh experts with the selection bias, as the published code does and no engine; see MoEConfig.

    Raises:
        ConfigError: The epsilon is no positive number, or the model has no part that the switch changes.

    Example:
        >>> from kimi_linear.models.kimi_linear.presets import preset
        >>> with_switches(preset("tiny"), latent_norm_eps=1e-5).blocks["mla"].mixer.latent_norm_eps
        1e-05
    """
    changes: dict[type[ComponentConfig], dict[str, Any]] = {}
    if latent_norm_eps is not None:
        given = latent_norm_eps
        if not isinstance(given, (int, float)) or isinstance(given, bool) or not 0 < given < math.inf:
            raise ConfigError(f"latent_norm_eps is {given!r}, expected a positive number such as 1e-5.")
        changes[MLAConfig] = {"latent_norm_eps": float(given)}
    if biased_combine:
        changes[MoEConfig] = {"biased_combine": True}
    kinds = {type(part) for block in config.layer_blocks for part in (block.mixer, block.ffn)}
    for kind, names in changes.items():
        if kind not in kinds:
            raise ConfigError(f"{next(iter(names))} was given and the model has no {kind.kind} layer; leave it out.")

    def changed(part: Any) -> Any:
        return dataclasses.replace(part, **changes[type(part)]) if type(part) in changes else part

    blocks = {
        name: BlockConfig(mixer=changed(block.mixer), ffn=changed(block.ffn)) for name, block in config.blocks.items()
    }
    return dataclasses.replace(config, blocks=blocks)


def read_end_tokens(directory: Path) -> tuple[int, ...]:
    """Return the end tokens of generation_config.json and those of a list in config.json.

    Raises:
        CheckpointError: A file is not JSON, or eos_token_id is neither a token nor a list of tokens.
    """
    found: dict[int, None] = {}
    for name in (CONFIG_NAME, GENERATION_NAME):
        path = directory / name
        if not os.path.exists(path):
            continue
        try:
            given = read_json(path).get("eos_token_id")
        except ConfigError as error:
            raise CheckpointError(str(error)) from error
        tokens = [] if given is None else given if isinstance(given, list) else [given]
        if not all(type(token) is int and 0 <= token <= MAX_SIZE for token in tokens):
            raise CheckpointError(f"{path}: eos_token_id is {shown(given)}, expected a token id or a list of them.")
        found |= dict.fromkeys(tokens)
    return tuple(found)
