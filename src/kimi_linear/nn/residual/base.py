"""The contract of a residual scheme: how sub-layers read from and write to the stream through depth."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn


class ResidualScheme(nn.Module, ABC):
    """Carry what flows through depth; only the scheme knows what a stream is.

    Sub-layers are numbered from 0: layer n has the mixer 2n and the feed-forward network 2n + 1. For each forward:
    `start` once, then `read` and `write` of every sub-layer in order, then `finish` once. No method changes its
    arguments or the scheme, so several forwards may be under way.
    """

    @abstractmethod
    def start(self, embedding: Tensor) -> Any:
        """Return the stream that begins with the embedding [B, T, D]."""

    @abstractmethod
    def read(self, stream: Any, sublayer: int) -> Tensor:
        """Return the input [B, T, D] of a sub-layer, before its norm."""

    @abstractmethod
    def write(self, stream: Any, output: Tensor, sublayer: int) -> Any:
        """Return the stream after a sub-layer's output [B, T, D]."""

    @abstractmethod
    def finish(self, stream: Any) -> Tensor:
        """Return what the final norm reads, [B, T, D]."""
