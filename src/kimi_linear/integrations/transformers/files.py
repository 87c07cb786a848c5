"""Checkpoints for the transformers model: read and written by the package's own reader and writer."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from kimi_linear.base.errors import ConfigError
from kimi_linear.checkpoint.configs import CONFIG_NAME, GENERATION_NAME, read_end_tokens
from kimi_linear.checkpoint.hub import resolve
from kimi_linear.checkpoint.load import load_checkpoint
from kimi_linear.checkpoint.save import save_checkpoint
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.models.kimi_linear.keys import key_maps
from kimi_linear.models.kimi_linear.model import KimiLinearLM
from kimi_linear.models.kimi_linear.state_dict import join_tensor

# Arguments of from_pretrained that a local read of safetensors satisfies whatever they are.
_SATISFIED = {
    "adapter_kwargs",
    "code_revision",
    "local_files_only",
    "low_cpu_mem_usage",
    "token",
    "trust_remote_code",
    "use_safetensors",
    "weights_only",
    "_commit_hash",
    "_from_auto",
}


def refuse(function: str, arguments: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first argument that asks for something; None, False and empty ask for nothing."""
    for name, value in arguments.items():
        if not (value is None or value is False or (isinstance(value, dict) and not value)):
            raise ConfigError(f"{function}: {name} is not supported here (it is {value!r}); leave it out.")


def checkpoint_directory(
    path_or_name: str | os.PathLike[str], arguments: Mapping[str, Any], positional: Sequence[Any]
) -> Path:
    """Return the directory to load from; refuse arguments that ask for another file or another way to read it."""
    if positional:
        raise ConfigError(f"from_pretrained: {len(positional)} more positional arguments were given, expected none.")
    directory = resolve(path_or_name)
    accepted = {"main", directory.name}
    asked = {name: value for name, value in arguments.items() if name not in _SATISFIED}
    revision = asked.pop("revision", None)
    refuse("from_pretrained", {"revision": None if revision in accepted else revision, **_without_eager(asked)})
    return directory


def _without_eager(arguments: dict[str, Any]) -> dict[str, Any]:
    # The name transformers has for "the model's own code".
    return {n: v for n, v in arguments.items() if (n, v) != ("attn_implementation", "eager")}


def load_network(directory: Path, dtype: str | torch.dtype | None, device_map: Any) -> KimiLinearLM:
    """Return the network of a checkpoint, as `device_map` places it."""
    device = _device(device_map)
    return load_checkpoint(directory, KimiLinearLM, dtype=None if dtype == "auto" else dtype, device=device)


def _device(device_map: Any) -> str | torch.device:
    if isinstance(device_map, dict) and device_map.keys() == {""}:
        device_map = device_map[""]
    if device_map == "auto":
        return torch.accelerator.current_accelerator() or "cpu"
    if isinstance(device_map, int):
        accelerator = torch.accelerator.current_accelerator()
        return "cpu" if accelerator is None else torch.device(accelerator.type, device_map)
    if device_map is None or isinstance(device_map, torch.device):
        return device_map or "cpu"
    if isinstance(device_map, str) and not device_map.startswith(("balanced", "sequential")):
        return device_map
    raise ConfigError(f"device_map is {device_map!r}, expected None, 'auto', a device or {{'': device}}: one device.")


def check_config(given: KimiLinearConfig, stored: KimiLinearConfig) -> None:
    """Raise ConfigError unless a configuration is that of the stored model, special tokens aside."""
    tokens = {name: getattr(stored, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if replace(given, **tokens) != stored:
        raise ConfigError("config describes another network than the checkpoint's config.json; load it without config.")


def read_generation_config(directory: Path, default: GenerationConfig) -> GenerationConfig:
    """Return the generation settings of a checkpoint; the model's own end tokens end a text too."""
    if not (directory / GENERATION_NAME).is_file():
        return default
    given = GenerationConfig.from_pretrained(directory)
    given.eos_token_id = sorted({*(default.eos_token_id or []), *read_end_tokens(directory)}) or None
    return given


def save(
    state: Mapping[str, Tensor],
    network: KimiLinearConfig,
    generation: GenerationConfig,
    path: str | os.PathLike[str],
    max_shard_size: int | str,
) -> None:
    """Write a checkpoint, whole if the directory is a checkpoint's alone, else file by file into it."""
    target = Path(path).expanduser().resolve()
    ends = generation.eos_token_id
    end_token_ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not _holds_other_things(target):
        save_checkpoint(state, network, target, max_shard_size=max_shard_size, end_token_ids=end_token_ids)
        generation.save_pretrained(target)
        return
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target) as temporary:
        new = Path(temporary) / "checkpoint"
        save_checkpoint(state, network, new, max_shard_size=max_shard_size, end_token_ids=end_token_ids)
        generation.save_pretrained(new)
        written = sorted(new.iterdir())
        for file in written:
            file.replace(target / file.name)
    for stale in target.glob("model*.safetensors*"):
        if stale.name not in {file.name for file in written}:
            stale.unlink()


def _holds_other_things(target: Path) -> bool:
    """Whether a directory holds more than a checkpoint: runs below it, or files without one."""
    entries = list(target.iterdir()) if target.is_dir() else []
    return any(entry.is_dir() for entry in entries) or (bool(entries) and not (target / CONFIG_NAME).is_file())


def module_names(
    given: Mapping[str, Tensor], own: Mapping[str, Tensor], network: KimiLinearConfig
) -> dict[str, Tensor]:
    """Return tensors under the module's names and shapes, from those names or from a checkpoint's.

    What is known under neither keeps its name. Of a shard that holds only some of a layer's experts, the others are
    taken from `own`.
    """
    left = dict(given)
    renamed = {}
    for key in key_maps(network):
        found = {name: left.pop(name) for name in key.release if name in left}
        if not found:
            continue
        if len(found) == 1 == len(key.release) and found[key.release[0]].shape == key.shape:
            renamed[key.module] = found[key.release[0]]
            continue
        rest = dict(zip(key.release, own[key.module].unbind(0), strict=True)) if key.is_stacked else {}
        renamed[key.module] = join_tensor(key, {**rest, **found})
    head = renamed.get("model.embed_tokens.weight")
    if network.tie_embeddings and head is not None:
        renamed["lm_head.weight"] = head
    return {**renamed, **left}
