"""The names, shapes and dtypes of a network's tensors in the released checkpoint layout, as data. No torch.

One `KeyMap` a parameter of the module, in the order of `config.shapes()`; together they are a bijection. What differs:

    model.layers.N.mlp.* of an expert layer     model.layers.N.block_sparse_moe.*
    ...experts.w1 [E, F, D] (w3, w2)            ...experts.e.w1.weight [F, D], one tensor an expert
    ...self_attn.A_log [H]                      ...self_attn.A_log [1, 1, H, 1]

Everything else keeps its name and shape. A_log and dt_bias are float32; all the rest, the router's selection bias
included, has the checkpoint's dtype.
"""

import dataclasses
import math
import re

from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.nn.ffn import MoEConfig

_EXPERTS = re.compile(r"(?P<prefix>.*)\.experts\.(?P<name>w[123])")
# Stored in float32 whatever the checkpoint's dtype is.
_FLOAT32 = ("A_log", "dt_bias")

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True)
class KeyMap:
    """One parameter of the module and the tensors that hold it in the release: one, or one an expert (axis 0)."""

    module: str
    shape: tuple[int, ...]
    release: tuple[str, ...]
    release_shape: tuple[int, ...]
    dtype: str

    @property
    def is_stacked(self) -> bool:
        """Whether the module stacks several release tensors on a new first axis."""
        return len(self.shape) == len(self.release_shape) + 1


def _layer_key(prefix: str, name: str, shape: tuple[int, ...], has_experts: bool, dtype: str) -> KeyMap:
    module = f"{prefix}.{name}"
    if name.startswith("mlp.") and has_experts:
        name = "block_sparse_moe." + name.removeprefix("mlp.")
    stored = "float32" if name.rsplit(".", 1)[-1] in _FLOAT32 else dtype
    experts = _EXPERTS.fullmatch(name)
    if experts:
        release = tuple(f"{prefix}.{experts['prefix']}.experts.{e}.{experts['name']}.weight" for e in range(shape[0]))
        return KeyMap(module, shape, release, shape[1:], stored)
    release_shape = (1, 1, shape[0], 1) if name.endswith(".A_log") else shape
    return KeyMap(module, shape, (f"{prefix}.{name}",), release_shape, stored)


def key_maps(config: KimiLinearConfig, dtype: str = "bfloat16") -> list[KeyMap]:
    """Return the map of every parameter, in the order of `config.shapes()`, for a checkpoint stored in `dtype`."""
    maps = []
    for name, shape in config.shapes().items():
        layer = re.fullmatch(r"(model\.layers\.(\d+))\.(.+)", name)
        if layer is None:
            maps.append(KeyMap(name, shape, (name,), shape, dtype))
            continue
        has_experts = isinstance(config.layer_blocks[int(layer[2])].ffn, MoEConfig)
        maps.append(_layer_key(layer[1], layer[3], shape, has_experts, dtype))
    return maps


def release_tensors(config: KimiLinearConfig, dtype: str = "bfloat16") -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and dtype name of every tensor of the release layout.

    Example:
        >>> from kimi_linear.models.kimi_linear.presets import preset
        >>> len(release_tensors(preset("48b-a3b")))
        20493
    """
    return {name: (m.release_shape, m.dtype) for m in key_maps(config, dtype) for name in m.release}


def release_bytes(config: KimiLinearConfig, dtype: str = "bfloat16") -> int:
    """Return the bytes of all tensors of the release layout.

    Example:
        >>> from kimi_linear.models.kimi_linear.presets import preset
        >>> release_bytes(preset("48b-a3b"))
        98245528576
    """
    return sum(math.prod(shape) * ITEMSIZE[name] for shape, name in release_tensors(config, dtype).values())
