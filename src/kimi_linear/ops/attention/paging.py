"""A cache in pages: a pool [P, page_size, ...] that all sequences share, and a table [N, max_pages] of their pages.

Token t of sequence n stands at pool[block_table[n, t // page_size], t % page_size]. Entries behind a sequence's last
page are not used and may hold anything.
"""

import torch
from torch import Tensor

from kimi_linear.base import env
from kimi_linear.base.errors import DtypeError, ShapeError
from kimi_linear.ops.attention.lengths import check_lengths_values
from kimi_linear.ops.checks import expect_same_device, expect_shape


def capacity(op: str, name: str, cache: Tensor, N: int, block_table: Tensor | None) -> tuple[int | None, int]:
    """Check the block table; return what the cache's first axis must be (None: any) and a sequence's positions.

    Args:
        op: Who asks, for messages.
        name: The cache's name, for messages.
        cache: [N, S, ...], or the pool [P, page_size, ...].
        N: Sequences.
        block_table: [N, max_pages], int32, or None where the cache is contiguous.
    """
    if cache.ndim < 2:
        raise ShapeError(f"{op}: {name} is {list(cache.shape)}, expected at least [N, S] or [P, page_size].")
    if block_table is None:
        return N, cache.shape[1]
    expect_shape(op, "block_table", block_table, [N, None], "N, max_pages")
    if block_table.dtype != torch.int32:
        raise DtypeError(f"{op}: block_table is {block_table.dtype}, expected int32; convert it.")
    expect_same_device(op, **{name: cache, "block_table": block_table})
    return None, block_table.shape[1] * cache.shape[1]


def check_block_table_values(block_table: Tensor, lengths: Tensor, pool: Tensor) -> None:
    """Raise ShapeError for a page in use that the pool lacks. Off the CPU only when debugging: it would wait."""
    if block_table.device.type != "cpu" and not env.read("KIMI_LINEAR_DEBUG"):
        return
    pages, page_size = pool.shape[:2]
    used = torch.arange(block_table.shape[1], device=block_table.device) * page_size < lengths[:, None]
    wrong = ((block_table < 0) | (block_table >= pages)) & used
    if wrong.any():
        n, i = (int(x) for x in wrong.nonzero()[0])
        raise ShapeError(
            f"block_table[{n}, {i}] is {int(block_table[n, i])}, expected a page of the pool, 0 to {pages - 1}."
        )


def unpaged(cache: Tensor, lengths: Tensor, block_table: Tensor | None) -> Tensor:
    """Return the cache as if it were contiguous, [N, S, ...]: itself, or a copy of the pages; checks all values."""
    if block_table is None:
        check_lengths_values(lengths, cache.shape[1])
        return cache
    check_lengths_values(lengths, cache.shape[1] * block_table.shape[1])
    check_block_table_values(block_table, lengths, cache)
    # A page not in use may be named by anything; any page will do, for what lies behind a length is not read.
    pages = block_table.long().clamp(0, max(0, cache.shape[0] - 1))
    return cache[pages].flatten(1, 2)
