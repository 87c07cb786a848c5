"""Read a GGUF file: its configuration from the metadata, and its tensors as those of the release."""

import importlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kimi_linear.base.errors import CheckpointError
from kimi_linear.checkpoint.gguf.header import GGUFHeader, GGUFTensor, read_header
from kimi_linear.checkpoint.gguf.metadata import ARCHITECTURE, from_metadata
from kimi_linear.checkpoint.gguf.names import DECAY, OUTPUT, gguf_moves, is_matrix
from kimi_linear.checkpoint.layout import join_pieces
from kimi_linear.checkpoint.reader import list_names
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.models.kimi_linear.dialects import Move
from kimi_linear.models.kimi_linear.keys import release_tensors

# Types that are numbers one by one: stored here as they are. All others are blocks with scales.
_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
_END_KEYS = ("eos", "eot", "eom")
# Other writers add tables of rotary factors, which this network has no use for.
_UNUSED = ("rope_freqs.weight",)


def load_gguf_package() -> Any:
    """Return the package gguf.

    Raises:
        CheckpointError: It is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise CheckpointError(
            "GGUF files need the package gguf, which is not installed; pip install 'kimi-linear[gguf]'."
        ) from error


class GGUFModel:
    """A checked file of a Kimi Linear model: its configuration and its tensors under the release's names.

    Args:
        path: The file, mapped as long as this object lives.
        config: What its metadata describes.
        header: What it holds.
        moves: Which of it holds which release tensor.
    """

    def __init__(
        self, path: Path, config: KimiLinearConfig, header: GGUFHeader, moves: Mapping[str, list[Move]]
    ) -> None:
        self.path, self.config = path, config
        self._tensors, self._moves = header.tensors, moves
        self._shapes = {name: shape for name, (shape, _) in release_tensors(config).items()}
        self._bytes = np.memmap(path, np.uint8, mode="r")
        ends = {header.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in _END_KEYS}
        self.end_token_ids = tuple(sorted(end for end in ends if type(end) is int and end < config.vocab_size))
        self.dtypes = {name: self._dtype(of_name[0]) for name, of_name in moves.items()}

    @property
    def dtype(self) -> torch.dtype:
        """What the file's matrices are in; float32 where they have scales or differ, so that nothing is rounded."""
        kinds = {tensor.kind for name, tensor in self._tensors.items() if is_matrix(name, tensor.shape)}
        return _PLAIN.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32

    def read(self, name: str) -> Tensor:
        """Return a release tensor, new, in its stored dtype; blocks with scales become float32.

        Raises:
            CheckpointError: A type that gguf cannot decode, or decay rates that are not negative.
        """
        moves = self._moves[name]
        pieces = {move.stored: self._piece(move) for move in moves}
        # The pieces are cut already.
        cut = [replace(move, shape=move.shape[len(move.take) :], take=()) for move in moves]
        tensor = join_pieces(self._shapes[name], cut, pieces.__getitem__)
        if not moves[0].stored.endswith(DECAY):
            return tensor
        if not bool((tensor < 0).all()):
            raise CheckpointError(f"{self.path}: {moves[0].stored} holds a decay rate that is not below zero.")
        # In float64, so that exp of the rounded logarithm is again the number in the file.
        return (-tensor.double()).log().float()

    def _dtype(self, move: Move) -> torch.dtype:
        return _PLAIN.get(self._tensors[move.stored].kind, torch.float32)

    def _piece(self, move: Move) -> Tensor:
        tensor = self._tensors[move.stored]
        whole = self._bytes[tensor.start : tensor.start + tensor.nbytes]
        piece = whole.reshape(*move.shape[:-1], -1)[move.take]
        shape = move.shape[len(move.take) :]
        if tensor.kind in _PLAIN:
            return torch.from_numpy(piece.copy()).view(_PLAIN[tensor.kind]).reshape(shape)
        gguf = load_gguf_package()
        try:
            with np.errstate(all="ignore"):
                numbers = gguf.quants.dequantize(piece, gguf.GGMLQuantizationType(tensor.kind))
        except NotImplementedError as error:
            raise CheckpointError(f"{self.path}: {move.stored} has a type that gguf cannot decode: {error}.") from error
        return torch.from_numpy(numbers).reshape(shape)


def open_gguf(path: Path) -> GGUFModel:
    """Check a GGUF file by every name and shape, and return it for reading. No tensor is read yet.

    Raises:
        CheckpointError: The package gguf is missing; or the file is damaged, of another model, or has missing,
            unexpected or misshapen tensors, by name.
    """
    sizes = {int(kind): size for kind, size in load_gguf_package().GGML_QUANT_SIZES.items()}
    try:
        header = read_header(path, sizes)
        _check_counts(header)
        config = from_metadata(header.metadata, OUTPUT in header.tensors)
        return GGUFModel(path, config, header, _check_tensors(header.tensors, config))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_gguf_end_tokens(path: Path) -> tuple[int, ...]:
    """Return the tokens of a GGUF file that end a text."""
    return open_gguf(path).end_token_ids


def _check_counts(header: GGUFHeader) -> None:
    """Check the metadata's counts against the tensors, before lists of that length are made."""
    given = {key: header.metadata.get(f"{ARCHITECTURE}.{key}") for key in ("block_count", "expert_count")}
    experts = {tensor.shape[0] for name, tensor in header.tensors.items() if name.endswith("ffn_gate_exps.weight")}
    layers = given["block_count"]
    if type(layers) is int and layers > len(header.tensors):
        raise CheckpointError(f"its metadata has {layers} layers, and it holds {len(header.tensors)} tensors.")
    if experts and given["expert_count"] not in experts:
        raise CheckpointError(f"its metadata has {given['expert_count']} experts, its tensors {max(experts)}.")
    if not experts and given["expert_count"]:
        raise CheckpointError(f"its metadata has {given['expert_count']} experts, its tensors none.")


def _check_tensors(tensors: Mapping[str, GGUFTensor], config: KimiLinearConfig) -> dict[str, list[Move]]:
    """Check names and shapes; return where each release tensor is."""
    moves: dict[str, list[Move]] = {}
    expected: dict[str, Move] = {}
    for move in gguf_moves(config):
        expected[move.stored] = move
        of_name = moves.setdefault(move.release, [])
        # A tied head is the embedding once more.
        if move.rows is not None or not of_name:
            of_name.append(move)
    optional = {OUTPUT} if config.tie_embeddings else set()
    problems = {
        "missing": expected.keys() - tensors.keys() - optional,
        "unexpected": tensors.keys() - expected.keys() - set(_UNUSED),
        "of another shape": [
            f"{name} {list(tensors[name].shape)} instead of {list(move.shape)}"
            for name, move in expected.items()
            if name in tensors and not _fits(tensors[name], move.shape)
        ],
    }
    found = [f"{len(names)} {what} ({list_names(names)})" for what, names in problems.items() if names]
    if found:
        raise CheckpointError(f"the tensors do not fit the metadata: {'; '.join(found)}; check that it is complete.")
    return moves


def _fits(tensor: GGUFTensor, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor has a shape, up to axes of size 1 where there are no blocks that span them."""
    same = [n for n in tensor.shape if n != 1] == [n for n in shape if n != 1]
    return tensor.shape == shape or (same and tensor.kind in _PLAIN)
