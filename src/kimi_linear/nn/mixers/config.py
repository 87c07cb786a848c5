"""The base of every mixer's configuration. No torch."""

import dataclasses

from kimi_linear.nn.component import ComponentConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerConfig(ComponentConfig):
    """Configuration of a part that mixes tokens; each subclass says what one sequence makes it remember."""
