"""Forward, backward and decoding of the short convolution."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from gpu_table.meta import empty
from kimi_linear.ops.conv.triton import backend

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def both_ways(D: int, W: int, dtype: torch.dtype, packed: bool, silu: bool = True) -> None:
    """Run forward and backward of 8192 tokens, packed ones from a state."""
    x, weight = empty(1, 8192, D, dtype=dtype), empty(D, W)
    initial = empty(3, D, W - 1, dtype=dtype) if packed else None
    cu_seqlens = empty(4, dtype=torch.int32) if packed else None
    given = (x, weight, initial, cu_seqlens, silu)
    y, final = backend.forward(*given)
    backend.backward(y, final, *given)


def decode(D: int, W: int, dtype: torch.dtype) -> None:
    """Run one token of 256 sequences."""
    pool, slots = empty(256, D, W - 1, dtype=dtype), empty(256, dtype=torch.int64)
    backend.step(empty(256, D, dtype=dtype), empty(D, W), pool, slots, True)


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Return every call of the table by name: four taps, and other numbers of them in one width."""
    for D, W in ((2304, 4), (4096, 4), (4096, 1), (4096, 2), (4096, 8), (4096, 16)):
        for dtype in DTYPES if W == 4 else DTYPES[::2]:
            name = f"D={D} W={W} {str(dtype)[6:]}"
            yield f"{name} plain", partial(both_ways, D, W, dtype, False)
            yield f"{name} packed", partial(both_ways, D, W, dtype, True)
            yield f"{name} linear", partial(both_ways, D, W, dtype, False, False)
            yield f"{name} decode", partial(decode, D, W, dtype)
