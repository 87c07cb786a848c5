"""The standard residual: the stream is one tensor, and outputs are added to it."""

from torch import Tensor

from kimi_linear.nn.residual.base import ResidualScheme


class StandardResidual(ResidualScheme):
    """x <- x + f(norm(x)).

    Example:
        >>> import torch
        >>> residual = StandardResidual()
        >>> residual.finish(residual.write(residual.start(torch.ones(1)), torch.ones(1), 0))
        tensor([2.])
    """

    def start(self, embedding: Tensor) -> Tensor:
        """Return the embedding."""
        return embedding

    def read(self, stream: Tensor, sublayer: int) -> Tensor:
        """Return the stream."""
        return stream

    def write(self, stream: Tensor, output: Tensor, sublayer: int) -> Tensor:
        """Return the sum."""
        return stream + output

    def finish(self, stream: Tensor) -> Tensor:
        """Return the stream."""
        return stream
