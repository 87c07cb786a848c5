"""Forward and backward of the gated activation."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from gpu_table.meta import empty
from kimi_linear.ops.swiglu.triton import backend


def both_ways(dtype: torch.dtype) -> None:
    """Run forward and backward."""
    x = empty(8192, 9216, dtype=dtype)
    backend.backward(backend.forward(x, x), x, x)


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Return every call of the table by name."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield str(dtype)[6:], partial(both_ways, dtype)
