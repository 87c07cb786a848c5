"""Absorbed MLA decode: pieces of a context and their sum."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from gpu_table.meta import empty
from kimi_linear.ops.attention.triton.backend import attend

# Heads, channels of the latent, and of the shared key part: the released model's, twice its heads, a rank's share of
# them, and sizes that are no powers of two.
SIZES = ((32, 512, 64), (64, 512, 64), (4, 512, 64), (24, 320, 48), (32, 512, 0))
# Of the query and of the cache.
DTYPES = (
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
)
# 0: a contiguous cache.
PAGE_SIZES = (0, 1, 7, 16, 64, 256)
N, S = 8, 8192


def call(sizes: tuple[int, int, int], dtype: torch.dtype, cache: torch.dtype, page: int) -> Callable[[], Any]:
    """Return one call, of a query part of 128 channels without positions."""
    H, R, dr = sizes
    rows, tokens = (N, S) if page == 0 else (1000, page)
    absorbed, query = empty(H, N, R, dtype=dtype).transpose(0, 1), empty(N, H, 128 + dr, dtype=dtype)
    caches = empty(rows, tokens, R, dtype=cache), empty(rows, tokens, dr, dtype=cache)
    table = None if page == 0 else empty(N, S // page, dtype=torch.int32)
    return lambda: attend(absorbed, query[..., 128:], *caches, empty(N, dtype=torch.int32), 0.1, table)


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Return every call of the table by name."""
    for H, R, dr in SIZES:
        for dtype, cache in DTYPES:
            for page in PAGE_SIZES:
                name = f"H={H} R={R} dr={dr} {str(dtype)[6:]} cache {str(cache)[6:]} page={page}"
                yield name, call((H, R, dr), dtype, cache, page)
