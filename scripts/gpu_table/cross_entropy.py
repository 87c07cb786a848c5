"""The softmax of linear cross entropy: losses alone, with gradients of a sum, and with one gradient a row."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from gpu_table.meta import empty
from kimi_linear.ops.cross_entropy.triton.backend import consume, default_rows

# Vocabularies of the released model and of small ones, one that no vector divides, and one below a block.
VOCABULARIES = (163_840, 32_000, 50_257, 1_000)
# Logits of bfloat16 models, and of float16 and float32 ones.
DTYPES = (torch.bfloat16, torch.float32)


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Return every call of the table by name."""
    for V in VOCABULARIES:
        for dtype in DTYPES:
            rows = default_rows(V, dtype.itemsize)
            logits, labels = empty(rows, V, dtype=dtype), empty(rows, dtype=torch.int64)
            losses, factors = empty(rows), empty(rows)
            for kind, given, grad in (("loss", None, False), ("sum", None, True), ("none", factors, True)):
                yield (
                    f"V={V} {str(dtype)[6:]} {kind}",
                    lambda z=logits, y=labels, o=losses, f=given, g=grad: consume(z, y, -100, f, o, g),
                )
