"""What serving a model takes: bytes of weights and caches, beside full attention, and how fast a token can be.

    bytes(batch, context) = weights + batch * cache(context)                                                      (1)
    seconds a step >= (weights that one token uses + batch * cache(context)) / memory bandwidth                   (2)

(2) is a bound: tokens of a batch that choose other experts read more.
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

from kimi_linear.base.errors import ConfigError
from kimi_linear.checkpoint.configs import read_model_json
from kimi_linear.checkpoint.gguf.read import open_gguf
from kimi_linear.checkpoint.hub import is_gguf, resolve
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.models.kimi_linear.keys import ITEMSIZE
from kimi_linear.models.kimi_linear.presets import preset
from kimi_linear.nn.config import BlockConfig
from kimi_linear.nn.mixers import MLAConfig

_UNITS = {"": 1, "k": 2**10, "m": 2**20}


@dataclass(frozen=True)
class CacheCost:
    """What an arrangement of the layers remembers: bytes of one sequence at the context, and of each further token."""

    name: str
    sequence: int
    token: int


@dataclass(frozen=True)
class Plan:
    """Bytes of a model's weights, all and those one token uses, and of its cache and of full attention's instead."""

    config: KimiLinearConfig
    dtype: str
    context: int
    batch: int
    weights: int
    active_weights: int
    caches: tuple[CacheCost, ...]

    @property
    def total(self) -> int:
        """Bytes of (1)."""
        return self.weights + self.batch * self.caches[0].sequence

    def step_seconds(self, bytes_per_second: float, cache: CacheCost | None = None) -> float:
        """Return the bound (2), with the model's own cache or another one."""
        return (self.active_weights + self.batch * (cache or self.caches[0]).sequence) / bytes_per_second


def parse_count(text: str) -> int:
    """Return a number of tokens: digits, with k for 1,024 or M for 1,048,576 of them.

    Example:
        >>> parse_count("128k"), parse_count("1M"), parse_count("4096")
        (131072, 1048576, 4096)
    """
    match = re.fullmatch(r"(\d+)([km]?)", text.strip().lower())
    if match is None or int(match[1]) == 0:
        raise ConfigError(
            f"a number of tokens is {text!r}, expected digits above 0, perhaps with k or M: 4096, 128k, 1M."
        )
    return int(match[1]) * _UNITS[match[2]]


def named_config(path_or_preset: str) -> KimiLinearConfig:
    """Return the configuration of a checkpoint directory, a GGUF file, a hub name in the local cache, or a preset."""
    if Path(path_or_preset).exists() or "/" in path_or_preset:
        path = resolve(path_or_preset)
        return open_gguf(path).config if is_gguf(path) else read_model_json(path)
    return preset(path_or_preset)


def make_plan(config: KimiLinearConfig, context: int, batch: int, dtype: str = "bfloat16") -> Plan:
    """Return what serving takes.

    Args:
        config: The model.
        context: Tokens remembered of every sequence.
        batch: Sequences at a time.
        dtype: Of weights and caches; recurrent states are float32 at least.

    Example:
        >>> plan = make_plan(preset("48b-a3b"), 1048576, 1)
        >>> [f"{cache.sequence / 2**30:.2f}" for cache in plan.caches]
        ['7.92', '30.38', '540.00']
    """
    if dtype not in ITEMSIZE:
        raise ConfigError(f"dtype is {dtype!r}, expected one of {', '.join(ITEMSIZE)}.")
    if context < 1 or batch < 1:
        raise ConfigError(f"context is {context} and batch {batch}, expected at least 1 of both.")
    itemsize = ITEMSIZE[dtype]
    return Plan(
        config,
        dtype,
        context,
        batch,
        itemsize * config.parameters(),
        itemsize * config.active_parameters(),
        tuple(_caches(config, context, itemsize)),
    )


def _caches(config: KimiLinearConfig, context: int, itemsize: int) -> list[CacheCost]:
    def cost(name: str, model: KimiLinearConfig) -> CacheCost:
        before = model.state_bytes(context - 1, itemsize)
        return CacheCost(name, model.state_bytes(context, itemsize), model.state_bytes(context, itemsize) - before)

    found = [cost("this model", config)]
    mla = next((block.mixer for block in config.layer_blocks if isinstance(block.mixer, MLAConfig)), None)
    if mla is not None:
        layers = len(config.layer_blocks)
        found.append(cost(f"latent attention in all {layers} layers", _with_mixer(config, mla)))
        token = layers * mla.num_heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim) * itemsize
        found.append(CacheCost("the same with keys and values of every head", token * context, token))
    return found


def _with_mixer(config: KimiLinearConfig, mixer: MLAConfig) -> KimiLinearConfig:
    """Return the network with one mixer in every layer."""
    blocks = {name: BlockConfig(mixer=mixer, ffn=block.ffn) for name, block in config.blocks.items()}
    return dataclasses.replace(config, blocks=blocks)


def table(plan: Plan, bytes_per_second: float | None = None) -> list[str]:
    """Return the plan as lines for a terminal; with a bandwidth also the bound on a step."""
    lines = [
        f"parameters    {plan.config.parameters():,}, {plan.config.active_parameters():,} of them active a token",
        f"weights       {_size(plan.weights)} in {plan.dtype}",
        f"cache         {_size(plan.caches[0].sequence)} a sequence of {plan.context:,} tokens",
        f"total         {_size(plan.total)} for {plan.batch} sequence{'s' if plan.batch > 1 else ''}",
        "",
    ]
    head = f"{'cache of':46} {'a sequence':>12} {'a token more':>13} {f'all {plan.batch}':>12}"
    lines.append(head + (f" {'step, at least':>15}" if bytes_per_second else ""))
    for cache in plan.caches:
        row = (
            f"{cache.name:46} {_size(cache.sequence):>12} {cache.token:>11,} B {_size(plan.batch * cache.sequence):>12}"
        )
        bound = f" {1e3 * plan.step_seconds(bytes_per_second, cache):>12,.1f} ms" if bytes_per_second else ""
        lines.append(row + bound)
    if bytes_per_second:
        lines += ["", f"The bound is reading weights and caches once at {1e-9 * bytes_per_second:.1f} GB/s."]
    return lines


def _size(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count} B"
