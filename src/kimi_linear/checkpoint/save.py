"""Save a model: configuration, weights and side files, all of them or none."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from kimi_linear.base.errors import CheckpointError
from kimi_linear.base.files import atomic_directory
from kimi_linear.checkpoint.configs import CONFIG_NAME, GENERATION_NAME, generation_json, model_json
from kimi_linear.checkpoint.layout import narrow_router_biases, release_views
from kimi_linear.checkpoint.writer import explain_write_errors, parse_size, write_tensors
from kimi_linear.models.kimi_linear.config import KimiLinearConfig

TOKENIZER_NAME = "tokenizer.json"


def save_checkpoint(
    state: Mapping[str, Tensor],
    config: KimiLinearConfig,
    path: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    end_token_ids: Sequence[int] = (),
    tokenizer_file: str | os.PathLike[str] | None = None,
) -> None:
    """Write a checkpoint directory in the released layout.

    Writes config.json, generation_config.json, model.safetensors (or shards with an index) and, if given, a copy of
    the tokenizer file. Everything goes into a temporary directory beside `path`, is flushed to disk and renamed. An
    existing checkpoint is replaced; files beside its weights (tokenizer, chat template, licence) are carried along.

    Args:
        state: The module's tensors by its own names, on any device; one tensor at a time is copied to the CPU.
        config: Of the module.
        path: The directory to write. If it exists it must be empty or hold a checkpoint.
        max_shard_size: Bytes of tensors in one file, as a number or as "5GB" or "500MiB".
        end_token_ids: Tokens that end a text, for generation_config.json.
        tokenizer_file: A tokenizer.json to copy.

    Raises:
        CheckpointError: The path is not such a directory, the disk is full or not writable, or the tensors do not
            match the configuration. What was there before is unchanged then.
        ConfigError: The shard size is not one.
    """
    target = Path(path).expanduser().resolve()
    limit = parse_size(max_shard_size)
    tensors = release_views(state, config)
    dtype = tensors["model.embed_tokens.weight"].dtype
    tensors = narrow_router_biases(tensors, dtype)
    # A kept file may be a link, so what is written anew must not be among them.
    written = {CONFIG_NAME, GENERATION_NAME} | ({TOKENIZER_NAME} if tokenizer_file is not None else set())
    with explain_write_errors(target):
        kept = [file for file in _existing_files(target) if file.name not in written and not _is_weights(file.name)]
        with atomic_directory(target) as directory:
            for file in kept:
                _link_or_copy(file, directory / file.name)
            if tokenizer_file is not None:
                shutil.copyfile(tokenizer_file, directory / TOKENIZER_NAME)
            write_json(directory / CONFIG_NAME, model_json(config, str(dtype).removeprefix("torch.")))
            write_json(directory / GENERATION_NAME, generation_json(config, end_token_ids))
            write_tensors(directory, tensors, limit)


def _existing_files(target: Path) -> list[Path]:
    """Return the files of an existing checkpoint; refuse to replace anything else."""
    if not target.exists():
        return []
    if not target.is_dir():
        raise _not_replaced(target, "it is a file")
    entries = sorted(target.iterdir())
    folder = next((entry for entry in entries if entry.is_dir()), None)
    if folder is not None:
        raise _not_replaced(target, f"it holds {folder.name}/")
    if entries and not (target / CONFIG_NAME).is_file():
        raise _not_replaced(target, f"it has no {CONFIG_NAME}")
    return entries


def _not_replaced(target: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"cannot save to {target}: {reason}, expected a new or empty directory or that of a checkpoint, which saving "
        "replaces; choose another directory."
    )


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json"))


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        # A link costs nothing for large files; the old name goes away with the old directory.
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write one JSON file, indented."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
