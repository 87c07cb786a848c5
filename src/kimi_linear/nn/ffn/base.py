"""The contract that every feed-forward network fills."""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class FFN(nn.Module, ABC):
    """Work on each token alone; built from (config, hidden_size), with its weights drawn at once."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of x, [..., D]; a token's output depends on that token only."""
