"""What a checkpoint directory holds: its network, its tensors, the layout they are in, and what is odd about it."""

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_linear.base.config import read_json
from kimi_linear.base.errors import CheckpointError
from kimi_linear.checkpoint.configs import CONFIG_NAME, GENERATION_NAME, OWN_TYPE, read_model_json
from kimi_linear.checkpoint.hub import resolve
from kimi_linear.checkpoint.layout import check_fits
from kimi_linear.checkpoint.reader import StoredTensor, stored_tensors
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.models.kimi_linear.dialects import RELEASE, Move

_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
# What rounding would change the decays of.
_FLOAT32 = ("A_log", "dt_bias")
_TOKENIZERS = ("tokenizer.json", "tiktoken.model")
# One letter a layer for drawing; a small one has a dense feed-forward network.
_LETTERS = {"kda": "K", "mla": "M", "gqa": "G", "gdn": "D"}


@dataclass(frozen=True)
class Inspection:
    """What was found; `problem` is why the checkpoint would not load, or "", `odd` what else deserves a look."""

    directory: Path
    config: KimiLinearConfig
    model_type: str
    tensors: int
    bytes_by_dtype: dict[str, int]
    layouts: tuple[str, ...]
    problem: str
    odd: tuple[str, ...]

    @property
    def schedule(self) -> str:
        """A letter a layer: K, M, G, D for the mixers; small where the feed-forward network is dense."""
        letters = [_LETTERS.get(block.mixer.kind, "?") for block in self.config.layer_blocks]
        dense = [block.ffn.kind == "swiglu" for block in self.config.layer_blocks]
        text = "".join(x.lower() if small else x for x, small in zip(letters, dense, strict=True))
        return " ".join(text[start : start + 4] for start in range(0, len(text), 4))


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Look at a checkpoint's configuration and headers; no tensor is read.

    Raises:
        CheckpointError: There is nothing to look at, or the configuration or a file's header cannot be read.
    """
    directory = resolve(path)
    config = read_model_json(directory)
    given = read_json(directory / CONFIG_NAME)
    stored = stored_tensors(directory)
    problem, moves = "", list[Move]()
    try:
        moves = check_fits(stored, config, directory)
    except CheckpointError as error:
        problem = str(error)
    sizes: Counter[str] = Counter()
    for tensor in stored.values():
        sizes[tensor.dtype] += math.prod(tensor.shape) * _BYTES.get(tensor.dtype, 1)
    return Inspection(
        directory,
        config,
        str(given.get("model_type")),
        len(stored),
        dict(sizes.most_common()),
        tuple(sorted({move.dialect for move in moves}, key=lambda name: (name != RELEASE, name))),
        problem,
        tuple(_oddities(directory, given, stored, moves)),
    )


def _oddities(
    directory: Path, given: Mapping[str, Any], stored: Mapping[str, StoredTensor], moves: list[Move]
) -> Iterator[str]:
    rounded = sorted(name for name, t in stored.items() if name.endswith(_FLOAT32) and t.dtype not in ("F32", "F64"))
    if rounded:
        yield f"{len(rounded)} decay parameters are stored below float32, the first {rounded[0]}: decays are rounded."
    used = {move.stored for move in moves}
    unused = sorted(stored.keys() - used) if moves else []
    if unused:
        yield f"{len(unused)} tensors have no use in this network, the first {unused[0]}."
    if given.get("model_type") != OWN_TYPE:
        yield from _foreign(given, moves)
    if not any((directory / name).is_file() for name in _TOKENIZERS):
        yield f"there is no tokenizer ({' or '.join(_TOKENIZERS)}): text cannot be read or written."
    if not (directory / GENERATION_NAME).is_file():
        yield f"there is no {GENERATION_NAME}: engines stop at config.json's eos_token_id alone."


def _foreign(given: Mapping[str, Any], moves: list[Move]) -> Iterator[str]:
    """Yield what other engines trip over in a checkpoint of the released type."""
    missing = [name for name in ("linear_attn_config", "first_k_dense_replace") if given.get(name) is None]
    if missing:
        yield f"config.json has no {' and no '.join(missing)}: vLLM and llama.cpp's converter need it."
    others = [move for move in moves if move.dialect != RELEASE]
    if others:
        yield (
            f"{len({move.stored for move in others})} tensors are not in the release's layout, the first "
            f"{others[0].stored}: engines that know the release alone do not find them; load and save it here once."
        )


def report(found: Inspection) -> list[str]:
    """Return the findings as lines for a terminal."""
    config = found.config
    total = sum(found.bytes_by_dtype.values())
    dtypes = ", ".join(f"{name} {size:,} B" for name, size in found.bytes_by_dtype.items())
    kinds = Counter(block.mixer.kind for block in config.layer_blocks)
    lines = [
        f"directory   {found.directory}",
        f"type        {found.model_type}",
        f"network     width {config.hidden_size:,}, {config.num_layers} layers, vocabulary {config.vocab_size:,}",
        f"layers      {found.schedule}",
        f"            {', '.join(f'{_LETTERS.get(k, k)} {k} x {n}' for k, n in kinds.items())}; small: no experts",
        f"parameters  {config.parameters():,}, {config.active_parameters():,} active a token",
        f"tensors     {found.tensors:,}, {total:,} bytes: {dtypes}",
        f"layout      {', '.join(found.layouts) or 'unknown'}",
        f"loads       {'no: ' + found.problem if found.problem else 'yes'}",
    ]
    return [*lines, *(f"odd         {sentence}" for sentence in found.odd)]
