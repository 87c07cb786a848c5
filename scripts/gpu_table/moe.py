"""Forward and backward of the routed experts."""

from collections.abc import Callable, Iterator

import torch

from gpu_table.meta import empty
from kimi_linear.ops.moe.triton import launch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Of the 48B model.
D, F, E, SLOTS = 2304, 1024, 256, 8


def both_ways(M: int, dtype: torch.dtype) -> None:
    """Run forward and backward of M tokens, the forward without a gradient too."""
    x, w1, w2 = empty(M, D, dtype=dtype), empty(E, F, D, dtype=dtype), empty(E, D, F, dtype=dtype)
    weights, experts = empty(M, SLOTS), empty(M, SLOTS, dtype=torch.int64)
    launch.forward(x, w1, w1, w2, weights, experts, False)
    _, h1, h3 = launch.forward(x, w1, w1, w2, weights, experts, True)
    launch.backward(x, x, w1, w1, w2, weights, experts, h1, h3)


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    """Return a call for every height of tiles and dtype, by name."""
    for dtype in DTYPES:
        for M in (1, 1024, 2048, 8192):
            yield f"D={D} F={F} E={E} {str(dtype)[6:]} M={M}", lambda M=M, dtype=dtype: both_ways(M, dtype)
