"""What lies in a checkpoint directory, read without trusting that it fits together: headers and JSON, no tensor."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_linear.base.config import read_json
from kimi_linear.base.errors import CheckpointError, ConfigError
from kimi_linear.checkpoint.configs import CONFIG_NAME, OWN_TYPE, read_model_json
from kimi_linear.checkpoint.header import StoredTensor, read_header
from kimi_linear.checkpoint.hub import is_gguf, resolve
from kimi_linear.checkpoint.writer import DTYPE_NAMES, INDEX_NAME
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.models.kimi_linear.dialects import Move, locate

ITEMSIZE = {name: dtype.itemsize for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its tensors, those that do not start at a multiple of their size, and what is wrong."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    misaligned: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Evidence:
    """What was found; `config` is None and `problem` says why where config.json cannot be used.

    Fields: `given`, config.json as it is; `index`, the index as it is, None without one; `moves` and `missing`, what
    of the release's tensors is where, and what is nowhere.
    """

    directory: Path
    given: Mapping[str, Any]
    config: KimiLinearConfig | None
    problem: str
    shards: tuple[Shard, ...]
    index: Mapping[str, Any] | None
    index_problem: str
    moves: tuple[Move, ...]
    missing: tuple[str, ...]

    @property
    def stored(self) -> dict[str, StoredTensor]:
        """Every tensor by name; the first file counts where two hold one."""
        found: dict[str, StoredTensor] = {}
        for shard in reversed(self.shards):
            found |= shard.tensors
        return found

    @property
    def duplicates(self) -> dict[str, list[Path]]:
        """The tensors that several files hold."""
        holders: dict[str, list[Path]] = {}
        for shard in self.shards:
            for name in shard.tensors:
                holders.setdefault(name, []).append(shard.path)
        return {name: paths for name, paths in holders.items() if len(paths) > 1}

    @property
    def is_released_type(self) -> bool:
        """Whether other engines know the model type."""
        return self.given.get("model_type") != OWN_TYPE

    @property
    def weight_map(self) -> dict[str, str]:
        """Of the index: tensor names to file names; empty without a usable one."""
        found = (self.index or {}).get("weight_map")
        return {str(name): str(file) for name, file in found.items()} if isinstance(found, dict) else {}


def gather(path: str | os.PathLike[str]) -> Evidence:
    """Read a checkpoint directory's JSON files and headers.

    Raises:
        CheckpointError: There is no such directory, or it is a GGUF file.
    """
    directory = resolve(path)
    if is_gguf(directory):
        raise CheckpointError(
            f"{directory} is a GGUF file, expected a directory; export it with --format release, and look at that."
        )
    given, _ = optional_json(directory / CONFIG_NAME)
    config, problem = None, ""
    try:
        config = read_model_json(directory)
    except CheckpointError as error:
        problem = str(error)
    shards = tuple(_read_shard(file) for file in sorted(directory.glob("*.safetensors")))
    index, index_problem = optional_json(directory / INDEX_NAME)
    shapes = {name: tensor.shape for shard in shards for name, tensor in shard.tensors.items()}
    moves, missing = locate(shapes, config) if config is not None else ([], [])
    return Evidence(
        *(directory, given or {}, config, problem, shards, index, index_problem, tuple(moves), tuple(missing))
    )


def optional_json(path: Path) -> tuple[dict[str, Any] | None, str]:
    """Return a JSON object, or None without the file, and what is wrong with it."""
    if not path.is_file():
        return None, ""
    try:
        return read_json(path), ""
    except ConfigError as error:
        return None, str(error)


def _read_shard(path: Path) -> Shard:
    try:
        tensors = read_header(path)
    except CheckpointError as error:
        return Shard(path, {}, problem=str(error))
    misaligned = (name for name, tensor in tensors.items() if tensor.start % ITEMSIZE.get(tensor.dtype, 1))
    return Shard(path, tensors, tuple(misaligned))
