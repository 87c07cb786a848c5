"""Load a model: build it without memory, check everything, then copy tensor by tensor from the mapped files."""

import os
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from kimi_linear.base.errors import DeviceError, DtypeError
from kimi_linear.checkpoint.configs import read_model_json
from kimi_linear.checkpoint.gguf.read import open_gguf
from kimi_linear.checkpoint.hub import is_gguf, resolve
from kimi_linear.checkpoint.layout import check_fits, part_of_release, piece_of_stored, release_views
from kimi_linear.checkpoint.reader import StoredTensor, open_shard, stored_tensors
from kimi_linear.checkpoint.writer import DTYPE_NAMES
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.models.kimi_linear.dialects import Move
from kimi_linear.models.kimi_linear.model import KimiLinearLM

M = TypeVar("M", bound=KimiLinearLM)

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPE_NAMES}


def load_checkpoint(
    path: str | os.PathLike[str],
    build: Callable[[KimiLinearConfig], M],
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> M:
    """Return a model with the weights of a checkpoint, in evaluation mode.

    Peak memory is the model itself: it is built on the meta device, and each tensor is copied from the mapped file to
    its place. Decay rates, gate biases and router biases stay float32.

    Args:
        path: A checkpoint directory, a GGUF file, or a hub name whose files are in the local cache. The network is
            never used.
        build: The model's class.
        dtype: Of the weights, "bfloat16" for instance; default: as stored.
        device: Where the weights go.

    Raises:
        CheckpointError: Nothing there, damaged, or not of a model this package has; says which file or tensor.
        DtypeError: Not a dtype of weights.
        DeviceError: No such device here.
    """
    target = torch_dtype(dtype)
    _check_device(device)
    directory = resolve(path)
    if is_gguf(directory):
        return _load_gguf(directory, build, target, device)
    config = read_model_json(directory)
    stored = stored_tensors(directory)
    moves = check_fits(stored, config, directory)
    with torch.device("meta"):
        model = build(config)
    model.to(target or _stored_dtype(stored)).to_empty(device=device)
    _fill(release_views(model.state_dict(), config), moves, {name: stored[name].file for name in stored})
    return model.eval()


def _load_gguf(
    path: Path, build: Callable[[KimiLinearConfig], M], dtype: torch.dtype | None, device: str | torch.device
) -> M:
    file = open_gguf(path)
    with torch.device("meta"):
        model = build(file.config)
    model.to(dtype or file.dtype).to_empty(device=device)
    for name, view in release_views(model.state_dict(), file.config).items():
        view.copy_(file.read(name))
    return model.eval()


def torch_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return a dtype of weights from its name or itself, None for None.

    Example:
        >>> torch_dtype("bfloat16")
        torch.bfloat16
    """
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    if name not in _DTYPES:
        raise DtypeError(f"dtype is {dtype!r}, expected one of {', '.join(_DTYPES)}, or None for the stored one.")
    return _DTYPES[name]


def _check_device(device: str | torch.device) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        # torch raises an AssertionError for a device it was built without.
        reason = str(error).splitlines()[0].rstrip(".")
        raise DeviceError(f"device {str(device)!r} cannot be used here: {reason}.") from error


def _stored_dtype(stored: Mapping[str, StoredTensor]) -> torch.dtype:
    name = stored["model.embed_tokens.weight"].dtype
    return next(dtype for dtype, spelled in DTYPE_NAMES.items() if spelled == name)


def _fill(views: Mapping[str, Tensor], moves: Iterable[Move], files: Mapping[str, Path]) -> None:
    """Copy every stored tensor into its views, file by file; each file is unmapped before the next one."""
    in_order = sorted(moves, key=lambda move: (files[move.stored], move.stored))
    for path, of_file in groupby(in_order, key=lambda move: files[move.stored]):
        with open_shard(path) as file:
            for name, of_tensor in groupby(of_file, key=lambda move: move.stored):
                tensor = file.get_tensor(name)
                for move in of_tensor:
                    _copy(tensor, views[move.release], move)


def _copy(tensor: Tensor, view: Tensor, move: Move) -> None:
    part = part_of_release(view, move)
    part.copy_(piece_of_stored(tensor, move).reshape(part.shape))
