"""Mixture of experts with a selection bias instead of a balancing loss (DeepSeek-V3, arXiv:2412.19437, Eqs. 12-16).

    s = sigmoid(W x) in float32;  chosen = top-k of s + b;  w = scaling * s[chosen] / (sum s[chosen] + 1e-20)
    y = sum_j w_j expert_j(x) + shared(x)

The bias b selects and never weighs, unless `biased_combine` asks for it. It gets no gradient: after each step,
b += rate * sign(mean load - load), so that overloaded experts are chosen less.

M tokens, E experts of width F, model width D.
"""

from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from kimi_linear.nn.ffn.base import FFN
from kimi_linear.nn.ffn.config import MoEConfig
from kimi_linear.nn.ffn.swiglu import SwiGLU
from kimi_linear.nn.init import DEFAULT_STD, SelfInitialised, init_weights
from kimi_linear.nn.precision import Float32Parameters, at_least_float32
from kimi_linear.ops.autocast import without_autocast
from kimi_linear.ops.moe import grouped_mlp, route


class Router(Float32Parameters, SelfInitialised):
    """Score the experts of each token, in float32 whatever the model's dtype.

    `expert_counts` [E] counts the tokens routed to each expert since the last bias update, in training mode only. It
    is None until the first of them, and never part of a checkpoint.
    """

    FLOAT32: ClassVar[frozenset[str]] = frozenset({"e_score_correction_bias"})
    expert_counts: Tensor | None

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        bias = torch.empty(config.num_experts, dtype=torch.float32)
        self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)
        self.register_buffer("expert_counts", None, persistent=False)

    @torch.no_grad()
    def reset_own(self, std: float = DEFAULT_STD, generator: Generator | None = None) -> None:
        """Draw the weight like every matrix; the bias starts at zero and the counts start over."""
        self.weight.normal_(0.0, std, generator=generator)
        self.e_score_correction_bias.zero_()
        self.expert_counts = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights [M, k], float32, and the experts [M, k] of each token of x [M, D]."""
        with without_autocast(x.device):
            logits = F.linear(at_least_float32(x), self.weight.to(at_least_float32(x).dtype))
        weights, experts = route(
            logits,
            self.e_score_correction_bias,
            top_k=self.config.top_k,
            renormalize=self.config.renormalize,
            scaling=self.config.scaling,
            activation=self.config.activation,
            biased_combine=self.config.biased_combine,
        )
        if self.training:
            self._count(experts)
        return weights, experts

    @torch.no_grad()
    def _count(self, experts: Tensor) -> None:
        chosen = experts.flatten()
        counts = torch.zeros(self.config.num_experts, dtype=torch.int64, device=chosen.device)
        counts = counts.scatter_add(0, chosen, torch.ones_like(chosen))
        self.expert_counts = counts if self.expert_counts is None else self.expert_counts + counts


class Experts(nn.Module, SelfInitialised):
    """The routed experts' matrices, stacked: w1 and w3 [E, F, D], w2 [E, D, F]."""

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        E, width = config.num_experts, config.intermediate_size
        self.w1 = nn.Parameter(torch.empty(E, width, hidden_size))
        self.w3 = nn.Parameter(torch.empty(E, width, hidden_size))
        self.w2 = nn.Parameter(torch.empty(E, hidden_size, width))

    @torch.no_grad()
    def reset_own(self, std: float = DEFAULT_STD, generator: Generator | None = None) -> None:
        """Draw like every matrix."""
        for weight in (self.w1, self.w3, self.w2):
            weight.normal_(0.0, std, generator=generator)

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Return the weighted sum over each token's experts, [M, D]."""
        return grouped_mlp(x, self.w1, self.w3, self.w2, weights, experts)


class MixtureOfExperts(FFN):
    """Routed experts plus shared ones.

    Example:
        >>> layer = MixtureOfExperts(MoEConfig(num_experts=4, top_k=2, intermediate_size=8), hidden_size=16)
        >>> layer(torch.zeros(2, 3, 16)).shape
        torch.Size([2, 3, 16])
    """

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.gate = Router(config, hidden_size)
        self.experts = Experts(config, hidden_size)
        self.shared_experts = None if config.shared is None else SwiGLU(config.shared, hidden_size)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of x, [..., D]; in training mode also count the tokens of each expert."""
        flat = x.reshape(-1, x.shape[-1])
        weights, experts = self.gate(flat)
        y = self.experts(flat, weights, experts).view_as(x)
        return y if self.shared_experts is None else y + self.shared_experts(x)

    @torch.no_grad()
    def update_router_bias(self) -> None:
        """Move the selection bias against the load counted since the last update, in place, and count afresh.

        Call it once an optimiser step; across processes, first sum `gate.expert_counts`. Without counts it does
        nothing.
        """
        counts = self.gate.expert_counts
        if counts is None:
            return
        load = counts.to(self.gate.e_score_correction_bias.dtype)
        self.gate.e_score_correction_bias.add_(torch.sign(load.mean() - load), alpha=self.config.bias_update_rate)
        self.gate.expert_counts = None
