"""What the configuration of every exchangeable part answers, and the table that finds a part by its kind. No torch.

A part is a mixer or a feed-forward network. Its parameter shapes are the truth: the counts are computed from them, and
tests compare them with the built module.
"""

import dataclasses
import importlib
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from kimi_linear.base.config import check_fields, check_type, from_dict, to_dict
from kimi_linear.base.errors import ConfigError, shown
from kimi_linear.base.registry import Registry

Shapes = dict[str, tuple[int, ...]]

# Of any one size of a network: what is above is a damaged file, and arithmetic with it only takes time.
MAX_SIZE = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComponentConfig(ABC):
    """Configuration of one part, given the model width `hidden_size` (D) when it is asked for counts."""

    # The part's name in a configuration file and in its table.
    kind: ClassVar[str]
    # Parameters that are never stored below float32.
    float32: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        check_fields(self, f"{self.kind}: ")

    @abstractmethod
    def shapes(self, hidden_size: int) -> Shapes:
        """Return the shape of every parameter by its name inside the part, in the order they are defined."""

    @abstractmethod
    def flops_per_token(self, hidden_size: int, context: int) -> int:
        """Return the forward FLOPs of one token that sees `context` tokens, itself included: 2 a multiply-add.

        Counted are matrix products, convolutions, the recurrence (3 K V multiply-adds a value head) and attention
        scores and sums; norms, gates and other elementwise work are not.
        """

    def parameters(self, hidden_size: int) -> int:
        """Return the number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes(hidden_size).values())

    def active_parameters(self, hidden_size: int) -> int:
        """Return the number of parameters that one token uses."""
        return self.parameters(hidden_size)

    def weight_multiplies(self, hidden_size: int) -> int:
        """Return the multiply-adds of one token with the weights: each matrix and filter entry is used once."""
        return sum(math.prod(shape) for shape in self.shapes(hidden_size).values() if len(shape) > 1)

    def state_bytes(self, context: int, itemsize: int) -> int:
        """Return the bytes remembered of one sequence of `context` tokens; a recurrent state is at least float32."""
        return 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, with the kind first."""
        return {"kind": self.kind, **to_dict(self)}

    def require_positive(self, *names: str) -> None:
        """Raise ConfigError unless each named field is a positive whole number (or None)."""
        for name in names:
            if getattr(self, name) is not None:
                check_whole(f"{self.kind}: {name}", getattr(self, name), least=1)


def check_whole(what: str, value: Any, least: int, most: int = MAX_SIZE) -> None:
    """Raise ConfigError unless the value is a whole number from `least` to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{what} is {shown(value)}, expected a whole number of at least {least}.")
    if value > most:
        raise ConfigError(f"{what} is {shown(value)}, expected at most {most}.")


def check_not_negative(what: str, value: float | None) -> None:
    """Raise ConfigError if a number is below zero; None passes."""
    if value is not None and value < 0:
        raise ConfigError(f"{what} is {value}, expected a number of at least 0.")


@dataclasses.dataclass(frozen=True)
class Component:
    """One row of a table: a configuration class, and where its layer class lives ("module:Class")."""

    config: type[ComponentConfig]
    layer: str

    def layer_class(self) -> Any:
        """Import and return the layer class; this is what first imports torch."""
        module, _, name = self.layer.partition(":")
        return getattr(importlib.import_module(module), name)


class ComponentTable(Registry[Component]):
    """Parts of one sort (mixers, feed-forward networks) by kind."""

    def register(self, config: type[ComponentConfig], layer: str) -> None:
        """Add a part under the kind that its configuration class names."""
        self.add(config.kind, Component(config, layer))

    def config_from_dict(self, given: Any, where: str) -> Any:
        """Build a configuration from plain values with a "kind" key; unknown kinds and keys are errors."""
        if not isinstance(given, dict) or "kind" not in given:
            raise ConfigError(f"{where} has no 'kind'; expected an object with a kind of: {', '.join(self)}.")
        check_type(given["kind"], str, f"{where}.kind")
        rest = {key: value for key, value in given.items() if key != "kind"}
        return from_dict(self[given["kind"]].config, rest, where)

    def build(self, config: ComponentConfig, hidden_size: int) -> Any:
        """Build the layer that a configuration describes."""
        return self[config.kind].layer_class()(config, hidden_size)
