"""Fresh weights, drawn in one fixed order from one generator, also after construction on the meta device.

Matrices and embeddings are normal(0, std), with the padding row zero; a module with other parameters says itself how
it starts. Sources: the released reference code and DeepSeek-V3.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Generator, Tensor, nn

DEFAULT_STD = 0.02


class SelfInitialised(ABC):
    """A module that draws its own parameters (not those of its submodules)."""

    @abstractmethod
    def reset_own(self, std: float = DEFAULT_STD, generator: Generator | None = None) -> None:
        """Fill this module's own parameters in place; safe on any device, without gradients."""


@torch.no_grad()
def init_weights(root: nn.Module, std: float = DEFAULT_STD, generator: Generator | None = None) -> None:
    """Fill every parameter below `root` in place; the same generator state gives the same weights.

    Example:
        >>> layer = nn.Linear(4, 4, bias=False, device="meta").to_empty(device="cpu")
        >>> init_weights(layer, generator=torch.Generator().manual_seed(0))
    """
    for module in root.modules():
        if isinstance(module, SelfInitialised):
            module.reset_own(std, generator)
        elif isinstance(module, nn.Linear):
            module.weight.normal_(0.0, std, generator=generator)
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(0.0, std, generator=generator)
            if module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()


@torch.no_grad()
def init_time_step_bias(dt_bias: Tensor, generator: Generator | None = None) -> None:
    """Fill with softplus^-1(dt), dt log-uniform in [1e-3, 1e-1] (and at least 1e-4), as Mamba does."""
    dt = dt_bias.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp_().clamp_(min=1e-4)
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))


@torch.no_grad()
def init_log_uniform(A_log: Tensor, low: float, high: float, generator: Generator | None = None) -> None:
    """Fill with log of uniform(low, high); a draw of 0 counts as 1e-4."""
    A_log.uniform_(low, high, generator=generator).clamp_(min=1e-4).log_()
