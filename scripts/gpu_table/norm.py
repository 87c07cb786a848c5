"""Forward and backward of the norms: heads, and rows of a model's width."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from gpu_table.meta import empty
from kimi_linear.ops.norm.triton import backend

HEADS, WIDTHS = (64, 128, 256), (2304, 7168, 16384)
KINDS = {"rms_norm": (False, 0), "gated_rms_norm": (True, 1), "gated_rms_norm silu": (True, 2), "l2_norm": (False, 0)}


def both_ways(name: str, D: int, dtype: torch.dtype) -> None:
    """Run forward and backward of 8192 rows."""
    x, weight = empty(8192, D, dtype=dtype), None if name == "l2_norm" else empty(D)
    gated, act = KINDS[name]
    kind = {"TERMS": D if weight is not None else 1, "ROUND": name == "rms_norm", "GATE": act}
    given = (x, x if gated else None, weight, 1e-5)
    backend.backward(backend.forward(*given, **kind), *given, **kind)


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Return every call of the table by name."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for D in (*HEADS, *WIDTHS):
            for kind in KINDS:
                yield f"{kind} D={D} {str(dtype)[6:]}", partial(both_ways, kind, D, dtype)
