"""Save a model: configuration, weights and side files, all of them or none."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from kimi_linear.base.errors import CheckpointError, ConfigError
from kimi_linear.base.files import atomic_directory
from kimi_linear.checkpoint.configs import CONFIG_NAME, GENERATION_NAME, fits_release, generation_json, model_json
from kimi_linear.checkpoint.layout import narrow_router_biases, release_views, with_tied_head
from kimi_linear.checkpoint.model_card import CARD_NAME, model_card
from kimi_linear.checkpoint.writer import explain_write_errors, parse_size, write_tensors
from kimi_linear.models.kimi_linear.config import KimiLinearConfig

TOKENIZER_NAME = "tokenizer.json"
VOCABULARIES = (TOKENIZER_NAME, "tiktoken.model")
# What belongs to a tokenizer. The Python file is carried for engines that have no other class for tiktoken.model; it is
# never run here.
TOKENIZER_FILES = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenization_kimi.py",
)


def save_checkpoint(
    state: Mapping[str, Tensor],
    config: KimiLinearConfig,
    path: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    end_token_ids: Sequence[int] = (),
    tokenizer_file: str | os.PathLike[str] | None = None,
    tokenizer_from: str | os.PathLike[str] | None = None,
    license: str | None = None,
    base_model: str | None = None,
) -> None:
    """Write a checkpoint directory in the released layout.

    Writes config.json, generation_config.json, model.safetensors (or shards with an index), a model card where there
    is no README.md yet and, if given, copies of the tokenizer's files. Tied embeddings are written a
    second time, as the output head, where the released type says so. Everything goes into a temporary directory
    beside `path`, is flushed to disk and renamed. An existing checkpoint is replaced; files beside its weights
    (tokenizer, chat template, licence, README.md) are carried along.

    Args:
        state: The module's tensors by its own names, on any device; one tensor at a time is copied to the CPU.
        config: Of the module.
        path: The directory to write. If it exists it must be empty or hold a checkpoint.
        max_shard_size: Bytes of tensors in one file, as a number or as "5GB" or "500MiB".
        end_token_ids: Tokens that end a text, for generation_config.json.
        tokenizer_file: A tokenizer.json to copy.
        tokenizer_from: A directory whose tokenizer to copy: vocabulary, its configuration and the chat template.
        license: Of the weights, "mit" for instance; for the model card.
        base_model: Hub name of what the model was made from; for the model card.

    Raises:
        CheckpointError: The path is not such a directory, the disk is full or not writable, there is no tokenizer
            where it was said to be, or the tensors do not match the configuration. What was there before is unchanged
            then.
        ConfigError: The shard size is not one, or the tokenizer was given twice.
    """
    target = Path(path).expanduser().resolve()
    limit = parse_size(max_shard_size)
    tensors = release_views(state, config)
    dtype = tensors["model.embed_tokens.weight"].dtype
    tensors = narrow_router_biases(tensors, dtype)
    tokenizer = _tokenizer_files(tokenizer_file, tokenizer_from)
    stale = set(TOKENIZER_FILES) if tokenizer_from is not None else set(tokenizer)
    dtype_name = str(dtype).removeprefix("torch.")
    described = model_json(config, dtype_name)
    if fits_release(config):
        tensors = with_tied_head(tensors, config)
    card = model_card(config, dtype_name, model_type=described["model_type"], license=license, base_model=base_model)
    with explain_write_errors(target):
        kept = {file.name: file for file in _existing_files(target) if file.name not in stale}
        files = {**kept, **tokenizer}
        write_checkpoint(target, tensors, described, generation_json(config, end_token_ids), files, card, limit)


def write_checkpoint(
    target: Path,
    tensors: Mapping[str, Tensor],
    described: Mapping[str, Any],
    generation: Mapping[str, Any],
    files: Mapping[str, Path],
    card: str,
    max_shard_size: int,
) -> None:
    """Write a checkpoint directory, whole or not at all, from what its files are to hold.

    Args:
        target: The directory; one that exists is replaced.
        tensors: By release name.
        described: Of config.json.
        generation: Of generation_config.json.
        files: Others to put there, by name. They are copied, or linked where they lie in the target already; weights
            and what is written anew are left out.
        card: Of README.md, unless there is one among the files.
        max_shard_size: Bytes of tensors in a file.

    Raises:
        OSError: The disk is full or not writable.
    """
    with atomic_directory(target) as directory:
        for name, source in files.items():
            # A kept file may be a link, so what is written anew must not be among them.
            if name not in (CONFIG_NAME, GENERATION_NAME) and not is_weights(name):
                _carry(source, directory / name, link=source.parent == target)
        write_json(directory / CONFIG_NAME, described)
        write_json(directory / GENERATION_NAME, generation)
        if CARD_NAME not in files:
            (directory / CARD_NAME).write_text(card, encoding="utf-8")
        write_tensors(directory, tensors, max_shard_size)


def _tokenizer_files(file: str | os.PathLike[str] | None, directory: str | os.PathLike[str] | None) -> dict[str, Path]:
    if directory is None:
        return {} if file is None else {TOKENIZER_NAME: Path(file)}
    if file is not None:
        raise ConfigError("tokenizer_file and tokenizer_from were both given; give the one that is meant.")
    found = {name: Path(directory) / name for name in TOKENIZER_FILES if (Path(directory) / name).is_file()}
    if not found.keys() & set(VOCABULARIES):
        raise CheckpointError(f"{directory} holds no tokenizer, expected {' or '.join(VOCABULARIES)} there.")
    return found


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


def is_weights(name: str) -> bool:
    """Return whether a file name is that of weights or of their index."""
    return name.endswith((".safetensors", ".safetensors.index.json"))


def _carry(source: Path, target: Path, link: bool) -> None:
    if link:
        try:
            # A link costs nothing for large files; the old name goes away with the old directory.
            os.link(source.resolve(), target)
            return
        except OSError:
            pass
    shutil.copyfile(source, target)


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write one JSON file, indented."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
