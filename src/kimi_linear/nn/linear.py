"""A linear layer as a module, over whichever product is faster (the operator's or torch's); and a layer's weight."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kimi_linear.ops.autocast import autocast_enabled
from kimi_linear.ops.linear import linear

# Rows from which the operator's float32 product is faster than torch's, which reads an unpacked weight once.
_ROWS = 16


class Linear(nn.Linear):
    """y = x weight^T + bias, like torch's own in everything but who computes it.

    In float32 on the CPU the operator is about twice as fast as torch's product. In bfloat16 torch's is a few per cent
    faster, and few rows are better left to it too.

    Example:
        >>> import torch
        >>> Linear(3, 2, bias=False)(torch.zeros(4, 3)).shape
        torch.Size([4, 2])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., N] of x [..., K], in the dtype of x or of the active autocast."""
        device = x.device.type
        is_float32 = x.dtype == self.weight.dtype == torch.float32 and not autocast_enabled(device)
        if device == "cpu" and is_float32 and x.numel() >= _ROWS * self.in_features:
            return linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


def weight_of(layer: nn.Module, features_in: int, x: Tensor) -> Tensor:
    """Return the matrix [N, features_in] that a linear layer without bias multiplies with, adapters included.

    For operators that work on the matrix itself. Whatever stands in place of a plain layer (a LoRA adapter, say) is
    asked for its products with the unit vectors, since its attribute `weight` would be that of the layer below.

    Args:
        layer: The layer, or what took its place.
        features_in: Columns of the matrix.
        x: Activations, for their dtype and device.

    Cost: nothing for a plain layer; else one call of it with `features_in` rows, so merge adapters to generate fast.

    Example:
        >>> import torch
        >>> layer, x = Linear(3, 2, bias=False), torch.zeros(4, 3)
        >>> weight_of(torch.nn.Sequential(layer), 3, x).equal(weight_of(layer, 3, x))
        True
    """
    if isinstance(layer, nn.Linear):
        return layer.weight
    product: Tensor = layer(torch.eye(features_in, dtype=x.dtype, device=x.device))
    return product.T.contiguous()
