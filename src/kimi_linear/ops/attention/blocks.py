"""Which rows of queries to take together, which keys they can see, and the mask inside such a block.

The mask of a whole call would be T * S bytes; a block's is bounded. Keys that no row of the block sees are left out.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

Block = tuple[slice, slice]


def block_rows(elements_per_row: int, budget: int) -> int:
    """Return how many rows of that many elements fit the budget, between 16 and 256."""
    return max(16, min(256, budget // max(1, elements_per_row)))


def blocks(T: int, S: int, window: int | None, rows: int) -> Iterator[Block]:
    """Cut T queries over S keys, the last query aligned with the last key, into (rows, visible columns)."""
    ahead = S - T
    for start in range(0, T, rows):
        stop = min(start + rows, T)
        first = 0 if window is None else max(0, start + ahead - window + 1)
        yield slice(start, stop), slice(first, stop + ahead)


def block_mask(T: int, S: int, window: int | None, block: Block, device: torch.device) -> Tensor:
    """Return which columns each row of the block sees, bool [rows, columns]."""
    rows, columns = block
    query = torch.arange(rows.start, rows.stop, device=device)[:, None] + (S - T)
    key = torch.arange(columns.start, columns.stop, device=device)
    mask = key <= query
    return mask if window is None else mask & (key > query - window)
