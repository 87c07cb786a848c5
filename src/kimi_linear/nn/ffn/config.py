"""Configuration of the feed-forward networks. No torch. E experts of width F, model width D."""

import dataclasses
from typing import ClassVar, Literal

from kimi_linear.base.errors import ConfigError
from kimi_linear.nn.component import ComponentConfig, Shapes, check_whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class FFNConfig(ComponentConfig):
    """Configuration of a part that works on each token alone and remembers nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwiGLUConfig(FFNConfig):
    """down(silu(gate(x)) * up(x)), of width `intermediate_size`; no biases."""

    kind: ClassVar[str] = "swiglu"

    intermediate_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("intermediate_size")

    def shapes(self, hidden_size: int) -> Shapes:
        """Return the shape of every parameter, named as in the released checkpoint."""
        return {
            "gate_proj.weight": (self.intermediate_size, hidden_size),
            "up_proj.weight": (self.intermediate_size, hidden_size),
            "down_proj.weight": (hidden_size, self.intermediate_size),
        }

    def flops_per_token(self, hidden_size: int, context: int) -> int:
        """Return the forward FLOPs of one token."""
        return 2 * self.weight_multiplies(hidden_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig(FFNConfig):
    """Top-k routed experts plus shared ones, balanced by a selection bias (DeepSeek-V3, arXiv:2412.19437).

    Args:
        num_experts: Routed experts, E.
        top_k: Routed experts a token uses.
        intermediate_size: Width of one expert, F.
        num_shared_experts: Experts every token uses, as one SwiGLU of that many times F; 0 for none.
        scaling: Factor on the routed sum.
        renormalize: Divide the chosen weights by their sum.
        activation: Of the router's logits: "sigmoid" or "softmax".
        bias_update_rate: Step of the selection bias at each `update_router_bias`.
        biased_combine: Add the selection bias to the chosen scores before they weigh, as the code published with the
            48B checkpoint does by mistake; only to reproduce its numbers.

    Example:
        >>> MoEConfig(num_experts=256, top_k=8, intermediate_size=1024, scaling=2.446).active_parameters(2304)
        64291072
    """

    kind: ClassVar[str] = "moe"
    float32: ClassVar[frozenset[str]] = frozenset({"gate.e_score_correction_bias"})

    num_experts: int
    top_k: int
    intermediate_size: int
    num_shared_experts: int = 1
    scaling: float = 1.0
    renormalize: bool = True
    activation: Literal["sigmoid", "softmax"] = "sigmoid"
    bias_update_rate: float = 1e-3
    biased_combine: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_experts", "top_k", "intermediate_size")
        check_whole("moe: num_shared_experts", self.num_shared_experts, least=0)
        if self.top_k > self.num_experts:
            raise ConfigError(f"moe: top_k is {self.top_k}, expected at most num_experts = {self.num_experts}.")

    @property
    def shared(self) -> SwiGLUConfig | None:
        """The shared experts as one SwiGLU, or None."""
        if self.num_shared_experts == 0:
            return None
        return SwiGLUConfig(intermediate_size=self.num_shared_experts * self.intermediate_size)

    def shapes(self, hidden_size: int) -> Shapes:
        """Return the shape of every parameter; the routed experts are stacked on the first axis."""
        E, F, D = self.num_experts, self.intermediate_size, hidden_size
        shared = {} if self.shared is None else self.shared.shapes(hidden_size)
        return {
            "gate.weight": (E, D),
            "gate.e_score_correction_bias": (E,),
            "experts.w1": (E, F, D),
            "experts.w3": (E, F, D),
            "experts.w2": (E, D, F),
            **{f"shared_experts.{name}": shape for name, shape in shared.items()},
        }

    def active_parameters(self, hidden_size: int) -> int:
        """Return the parameters of the router, of `top_k` experts and of the shared experts."""
        idle = self.num_experts - self.top_k
        return self.parameters(hidden_size) - idle * 3 * hidden_size * self.intermediate_size

    def flops_per_token(self, hidden_size: int, context: int) -> int:
        """Return the forward FLOPs of one token: the active matrices."""
        return 2 * (self.active_parameters(hidden_size) - self.num_experts)
