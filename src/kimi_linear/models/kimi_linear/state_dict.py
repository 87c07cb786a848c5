"""A module's tensors to and from the released checkpoint's layout, by the maps of `keys`."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kimi_linear.base.errors import CheckpointError
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.models.kimi_linear.keys import KeyMap, key_maps


def split_tensor(key: KeyMap, tensor: Tensor) -> dict[str, Tensor]:
    """Return the release tensors of one parameter: views of it, in its dtype."""
    if key.is_stacked:
        return dict(zip(key.release, tensor.unbind(0), strict=True))
    return {key.release[0]: tensor.reshape(key.release_shape)}


def join_tensor(key: KeyMap, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return one parameter from its release tensors; experts are stacked into a new tensor.

    Raises:
        CheckpointError: A tensor is missing or has another number of elements; shapes in circulation that only add or
            drop axes of size 1 are accepted.
    """
    parts = []
    for name in key.release:
        if name not in tensors:
            raise CheckpointError(f"checkpoint has no tensor {name!r}; it is incomplete or of another model.")
        tensor = tensors[name]
        if _without_ones(tensor.shape) != _without_ones(key.release_shape):
            raise CheckpointError(
                f"checkpoint tensor {name!r} is {list(tensor.shape)}, expected {list(key.release_shape)}; it is of "
                "another model."
            )
        parts.append(tensor)
    if key.is_stacked:
        return torch.stack([part.reshape(key.release_shape) for part in parts])
    return parts[0].reshape(key.shape)


def _without_ones(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size != 1]


def to_release(state: Mapping[str, Tensor], config: KimiLinearConfig) -> dict[str, Tensor]:
    """Return a module's state dict under the release's names and shapes, in its own dtypes, without copying.

    Example:
        >>> from kimi_linear.models.kimi_linear.model import KimiLinearLM
        >>> from kimi_linear.models.kimi_linear.presets import preset
        >>> config = preset("tiny")
        >>> tensors = to_release(KimiLinearLM(config).state_dict(), config)
        >>> tensors["model.layers.0.self_attn.A_log"].shape
        torch.Size([1, 1, 4, 1])
    """
    released: dict[str, Tensor] = {}
    for key in key_maps(config):
        if key.module not in state:
            raise CheckpointError(f"state dict has no {key.module!r}; it is not of this configuration.")
        released.update(split_tensor(key, state[key.module]))
    return released


def from_release(tensors: Mapping[str, Tensor], config: KimiLinearConfig) -> dict[str, Tensor]:
    """Return a module's state dict from the release's tensors: the inverse of `to_release`.

    Raises:
        CheckpointError: A tensor is missing, has another shape, or is not of this configuration.
    """
    maps = key_maps(config)
    unknown = sorted(set(tensors) - {name for key in maps for name in key.release})
    if unknown:
        raise CheckpointError(
            f"checkpoint has {len(unknown)} unknown tensors, the first {unknown[0]!r}; it is of another model."
        )
    return {key.module: join_tensor(key, tensors) for key in maps}
