"""Starting kernels."""

from typing import Any

import triton


def padded(size: int) -> int:
    """Return the tile size for so many channels: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(size))


def start(kernel: Any, programs: int, /, *args: Any, **options: Any) -> None:
    """Launch a kernel; nothing where there is nothing to do."""
    if programs:
        kernel[(programs,)](*args, **options)
