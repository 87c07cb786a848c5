"""Configuration of a whole network: named blocks, and the name of the block at each layer. No torch."""

import dataclasses
import math
import typing
from typing import Any

from kimi_linear.base.config import check_fields, check_keys, check_type, to_dict
from kimi_linear.base.errors import ConfigError, plain, shown
from kimi_linear.base.registry import unknown_name
from kimi_linear.nn.component import Shapes, check_not_negative, check_whole
from kimi_linear.nn.config import BlockConfig
from kimi_linear.nn.residual import RESIDUALS

# What is above is a damaged file, and going through it only takes time.
MAX_LAYERS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class KimiLinearConfig:
    """A causal language model of blocks; `layers` names the block at each depth and is the only placement.

    Args:
        vocab_size: Rows of the embedding and of the output head.
        hidden_size: Model width, D.
        blocks: Blocks by name.
        layers: One name of `blocks` a layer, from the input up.
        residual: Kind of residual scheme.
        norm_eps: Epsilon of the block norms and the final norm.
        tie_embeddings: Use the embedding as the output head too.
        initializer_range: Standard deviation of freshly drawn matrices.
        max_length: Context length the model is meant for; written into a released configuration.
        bos_token_id: Token that begins a text, if any.
        eos_token_id: Token that ends a text, if any.
        pad_token_id: Token whose embedding is zero and stays so, if any.

    Example:
        >>> from kimi_linear.models.kimi_linear.presets import preset
        >>> config = preset("48b-a3b")
        >>> config.parameters(), config.active_parameters()
        (49122681728, 3106972544)
    """

    vocab_size: int
    hidden_size: int
    blocks: dict[str, BlockConfig]
    layers: tuple[str, ...]
    residual: str = "standard"
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    max_length: int = 4096
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, "")
        for name in ("vocab_size", "hidden_size", "max_length"):
            check_whole(name, getattr(self, name), least=1)
        check_not_negative("norm_eps", self.norm_eps)
        check_not_negative("initializer_range", self.initializer_range)
        if not self.layers:
            raise ConfigError("layers is empty; name one block a layer.")
        check_whole("the number of layers", len(self.layers), least=1, most=MAX_LAYERS)
        for name in self.layers:
            if name not in self.blocks:
                raise ConfigError(f"layers: {unknown_name('block', name, list(self.blocks))}")
        unused = sorted(set(self.blocks) - set(self.layers))
        if unused:
            raise ConfigError(f"blocks {shown(unused)} stand at no layer; name them in layers or remove them.")
        if self.residual not in RESIDUALS:
            raise ConfigError(unknown_name("residual", self.residual, list(RESIDUALS)))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            if value is None:
                continue
            check_whole(name, value, least=0)
            if value >= self.vocab_size:
                raise ConfigError(f"{name} is {value}, expected a token below vocab_size = {self.vocab_size}.")

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def layer_blocks(self) -> tuple[BlockConfig, ...]:
        """The block of each layer."""
        return tuple(self.blocks[name] for name in self.layers)

    def shapes(self) -> Shapes:
        """Return the shape of every parameter of the built module by its name."""
        shapes: Shapes = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for index, block in enumerate(self.layer_blocks):
            for name, shape in block.shapes(self.hidden_size).items():
                shapes[f"model.layers.{index}.{name}"] = shape
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tie_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def parameters(self) -> int:
        """Return the number of parameters; a tied embedding counts once."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def active_parameters(self, *, embedding: bool = False, head: bool = True) -> int:
        """Return the number of parameters one token uses, with or without the embedding and the output head.

        The default, with the head only, is the convention behind names such as "A3B": the embedding is a look-up.
        """
        matrix = self.vocab_size * self.hidden_size
        blocks = sum(block.active_parameters(self.hidden_size) for block in self.layer_blocks)
        return blocks + self.hidden_size + matrix * (int(embedding) + int(head))

    def flops_per_token(self, context: int) -> int:
        """Return the forward FLOPs of one token that sees `context` tokens, itself included; training costs 3 times."""
        blocks = sum(block.flops_per_token(self.hidden_size, context) for block in self.layer_blocks)
        return blocks + 2 * self.vocab_size * self.hidden_size

    def state_bytes(self, context: int, itemsize: int) -> int:
        """Return the bytes a cache uses for one sequence of `context` tokens, activations being `itemsize` bytes."""
        return sum(block.state_bytes(context, itemsize) for block in self.layer_blocks)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        plain = {f.name: to_dict(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "blocks"}
        plain["blocks"] = {name: block.to_dict() for name, block in self.blocks.items()}
        return plain

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> "KimiLinearConfig":
        """Build from plain values; unknown keys are errors naming the nearest known one."""
        check_keys(cls, given, "config")
        for name, hint in typing.get_type_hints(cls).items():
            if name in given and name not in ("blocks", "layers"):
                check_type(given[name], hint, f"config.{name}")
        if not isinstance(given["blocks"], dict):
            raise ConfigError(f"config.blocks is {type(given['blocks']).__name__}, expected an object of named blocks.")
        if not isinstance(given["layers"], (list, tuple)):
            raise ConfigError(f"config.layers is {shown(given['layers'])}, expected a list of block names.")
        if len(given["blocks"]) > len(given["layers"]):
            raise ConfigError("config.blocks has more blocks than there are layers; remove those that stand at none.")
        blocks = {
            name: BlockConfig.from_dict(block, f"config.blocks.{plain(name)}")
            for name, block in given["blocks"].items()
        }
        return cls(**{**given, "blocks": blocks, "layers": tuple(given["layers"])})
