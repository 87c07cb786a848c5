"""Configuration of one block: a mixer and a feed-forward network, each behind its norm. No torch."""

import dataclasses
import math
from typing import Any

from kimi_linear.base.config import check_keys
from kimi_linear.nn.component import Shapes
from kimi_linear.nn.ffn import FFNS, FFNConfig
from kimi_linear.nn.mixers import MIXERS, MixerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One layer of the network: x + mixer(norm(x)), then x + ffn(norm(x)), under the standard residual."""

    mixer: MixerConfig
    ffn: FFNConfig

    def shapes(self, hidden_size: int) -> Shapes:
        """Return the shape of every parameter, named as in the released checkpoint's layers."""
        return {
            "input_layernorm.weight": (hidden_size,),
            **{f"self_attn.{name}": shape for name, shape in self.mixer.shapes(hidden_size).items()},
            "post_attention_layernorm.weight": (hidden_size,),
            **{f"mlp.{name}": shape for name, shape in self.ffn.shapes(hidden_size).items()},
        }

    @property
    def float32(self) -> frozenset[str]:
        """Names of the parameters that are never stored below float32."""
        mixer = {f"self_attn.{name}" for name in self.mixer.float32}
        return frozenset(mixer | {f"mlp.{name}" for name in self.ffn.float32})

    def parameters(self, hidden_size: int) -> int:
        """Return the number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes(hidden_size).values())

    def active_parameters(self, hidden_size: int) -> int:
        """Return the number of parameters that one token uses."""
        parts = self.mixer.active_parameters(hidden_size) + self.ffn.active_parameters(hidden_size)
        return parts + 2 * hidden_size

    def flops_per_token(self, hidden_size: int, context: int) -> int:
        """Return the forward FLOPs of one token that sees `context` tokens, itself included."""
        return self.mixer.flops_per_token(hidden_size, context) + self.ffn.flops_per_token(hidden_size, context)

    def state_bytes(self, context: int, itemsize: int) -> int:
        """Return the bytes remembered of one sequence of `context` tokens."""
        return self.mixer.state_bytes(context, itemsize) + self.ffn.state_bytes(context, itemsize)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"mixer": self.mixer.to_dict(), "ffn": self.ffn.to_dict()}

    @classmethod
    def from_dict(cls, given: dict[str, Any], where: str = "block") -> "BlockConfig":
        """Build from plain values; unknown kinds and keys are errors naming the nearest known one."""
        check_keys(cls, given, where)
        return cls(
            mixer=MIXERS.config_from_dict(given["mixer"], f"{where}.mixer"),
            ffn=FFNS.config_from_dict(given["ffn"], f"{where}.ffn"),
        )
