"""Many tokens at once: the plain modules run, with packed weights in place of their parameters."""

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kimi_linear.inference.native.layers import Parts
from kimi_linear.inference.native.structs import MoeLayer
from kimi_linear.ops import native
from kimi_linear.ops.native.library import DTYPES


class Stand:
    """Packed weights that can stand in for the parameters of a network.

    Args:
        parts: Which modules, and what with.
    """

    def __init__(self, parts: Parts) -> None:
        self._forwards: list[tuple[nn.Module, Callable[..., Tensor]]] = [
            *parts.products.items(),
            *((module, _experts(struct)) for module, struct in parts.experts.items()),
        ]
        self._lock = threading.RLock()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Let the modules multiply with their packed weights for the length of a with-statement.

        Changes how the modules run, not their parameters. Other threads wait to get inside, but a plain call of the
        same modules from another thread meanwhile would run on packed weights too.
        """
        with self._lock:
            try:
                for module, forward in self._forwards:
                    module.forward = forward
                yield
            finally:
                for module, _ in self._forwards:
                    module.__dict__.pop("forward", None)


def _experts(layer: MoeLayer) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return what takes the place of `Experts.forward`."""
    address = ctypes.addressof(layer)

    def forward(x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        x, experts = x.contiguous(), experts.to(torch.int64).contiguous()
        y = torch.empty_like(x)
        native.kernel("engine_experts", "pppppiii")(
            address, x, weights.float().contiguous(), experts, y, x.shape[0], x.shape[1], DTYPES[x.dtype]
        )
        return y

    return forward
