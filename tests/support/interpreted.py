"""Single programs of interpreted kernels, on memory that is reserved but never filled.

What a grid of millions of programs computes at its end, far beyond 2^31 elements, costs as much as its last programs.
"""

import dataclasses
import math
import mmap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

# Linux: pages count when they are first written, not when they are reserved.
_NO_RESERVE = 0x4000


@dataclass(frozen=True)
class Launch:
    """A kernel's name, its grid and its arguments."""

    name: str
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


def sparse(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor of zeros whose pages come into being where they are written."""
    size = max(1, math.prod(shape)) * dtype.itemsize
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    except OSError as error:
        pytest.skip(f"{size >> 30} GiB of address space cannot be reserved: {error}")
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(shape)


@contextmanager
def programs(chosen: Callable[[str, int], Iterable[int]]) -> Iterator[list[Launch]]:
    """Run of every kernel only the programs chosen(name, how many it has); yield the launches, as they come.

    An addition or multiplication that leaves int32 is an error, where compiled code would go on with a wrong address.
    """
    from triton.runtime import interpreter

    seen: list[Launch] = []
    builder, run = interpreter.interpreter_builder, interpreter.GridExecutor.__call__

    def run_chosen(executor: Any, *args: Any, **options: Any) -> None:
        seen.append(Launch(executor.fn.__name__, executor.grid, args, options))
        for program in chosen(executor.fn.__name__, executor.grid[0]):
            builder.set_grid_idx = lambda *_, program=program: setattr(builder, "grid_idx", (program, 0, 0))
            run(interpreter.GridExecutor(executor.fn, executor.arg_names, (1,)), *args, **options)

    before = builder.options
    builder.options = dataclasses.replace(before, debug=True)
    interpreter.GridExecutor.__call__ = run_chosen
    try:
        yield seen
    finally:
        interpreter.GridExecutor.__call__ = run
        builder.options = before
        vars(builder).pop("set_grid_idx", None)
