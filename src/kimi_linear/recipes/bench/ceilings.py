"""How fast the machine can be: what every figure is held against, measured in the same run.

Names and units, each for all threads; those with `_core` for one:
    fma_float32, dot_bfloat16, dot_int8   GFLOP/s of multiply-adds that touch no memory (native kernels only)
    gemm_float32, gemm_bfloat16           GFLOP/s of a matrix product through torch
    packed_gemm_float32, _bfloat16        GFLOP/s of the same through oneDNN with the weight packed once
    packed_row_bfloat16                   GB/s of weights in a product with a single row
    copy_gigabytes, read_gigabytes        GB/s of memory, read plus written, and only read
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from kimi_linear.ops import native

Call = Callable[[], object]
PEAK_ROUNDS = 2_000_000
PEAKS = {"fma_float32": "peak_fma_f32", "dot_bfloat16": "peak_dot_bf16", "dot_int8": "peak_dot_i8"}
# Larger than any cache, small enough to be there.
STREAM_BYTES = 2**28


def best(call: Call, seconds: float) -> float:
    """Return the lower quartile of the times of a call, over at least four calls and about `seconds`.

    A ceiling is what is possible, so the slow readings are the machine's other business.
    """
    call()
    times: list[float] = []
    while len(times) < 4 or sum(times) < seconds:
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    return statistics.quantiles(times, n=4, method="inclusive")[0]


def peak(kernel: str, threads: int, seconds: float) -> float:
    """Return the GFLOP/s of one of the native peak kernels on that many threads; 0 where it has no instruction."""
    run = native.kernel(kernel, "iiffpp")
    sink, flop = torch.zeros(threads), torch.zeros(1, dtype=torch.float64)
    taken = best(lambda: run(threads, PEAK_ROUNDS, 0.999, 0.001, sink, flop), seconds)
    return 1e-9 * flop.item() / taken


def gemm(dtype: torch.dtype, seconds: float, size: int = 2048) -> float:
    """Return the GFLOP/s of a square matrix product through torch."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype)
    return 2e-9 * size**3 / best(lambda: torch.mm(a, b, out=out), seconds)


def packed_linear(weight: Tensor, rows: int) -> Callable[[Tensor], Tensor] | None:
    """Return the product with a weight [N, K] packed by oneDNN for inputs of `rows` rows, or None where torch has none.

    The operators are those which torch.compile emits for frozen weights; they are private, so anything may be wrong.
    """
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

        def run(x: Tensor) -> Tensor:
            return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

        run(torch.zeros(rows, weight.shape[1], dtype=weight.dtype))
    except (AttributeError, RuntimeError, NotImplementedError):
        return None
    return run


def packed_gemm(dtype: torch.dtype, seconds: float, size: int = 2048, rows: int | None = None) -> float:
    """Return the seconds of a product of [rows, size] with a packed [size, size] weight; infinity without one."""
    rows = rows or size
    run = packed_linear(torch.randn(size, size).to(dtype), rows)
    if run is None:
        return float("inf")
    x = torch.randn(rows, size).to(dtype)
    return best(lambda: run(x), seconds)


def packed_row(seconds: float, size: int = 8192) -> float:
    """Return the GB/s at which a one-row product reads a packed bfloat16 weight larger than the caches."""
    return 2e-9 * size * size / packed_gemm(torch.bfloat16, seconds, size, rows=1)


class Memory:
    """Memory larger than any cache, to be read or copied whenever its speed is wanted.

    Example:
        >>> Memory(2**22).read(0.01) > 0
        True
    """

    def __init__(self, size: int = STREAM_BYTES) -> None:
        self.size, self._data, self._target = size, torch.ones(size // 4), torch.zeros(size // 4)

    def copy_once(self) -> None:
        """Read it and write as much."""
        self._target.copy_(self._data)

    def read_once(self) -> None:
        """Read it."""
        if native.active_level() is None:
            self._data.sum()
        else:
            # The other half takes a sum for each 64 KiB.
            native.kernel("peak_read", "pip")(self._data, self._data.numel(), self._target)

    def copy(self, seconds: float) -> float:
        """Return the GB/s of copies, read plus written."""
        return 2e-9 * self.size / best(self.copy_once, seconds)

    def read(self, seconds: float) -> float:
        """Return the GB/s of reading."""
        return 1e-9 * self.size / best(self.read_once, seconds)


def measure(seconds: float = 0.5) -> dict[str, float]:
    """Measure every ceiling, about `seconds` each; one that cannot be measured here is left out."""
    threads = torch.get_num_threads()
    found: dict[str, float] = {}
    if native.active_level() is not None:
        for name, kernel in PEAKS.items():
            found[f"{name}_core"] = peak(kernel, 1, seconds)
            found[name] = peak(kernel, threads, seconds)
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        found[f"gemm_{name}"] = gemm(dtype, seconds)
        found[f"packed_gemm_{name}"] = 2e-9 * 2048**3 / packed_gemm(dtype, seconds)
    found["packed_row_bfloat16"] = packed_row(seconds)
    memory = Memory()
    found["copy_gigabytes"] = memory.copy(seconds)
    found["read_gigabytes"] = memory.read(seconds)
    return {name: rate for name, rate in found.items() if rate > 0}


def better(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """Return the better of two readings of each: what the machine can do, whatever disturbed one of them.

    Example:
        >>> better({"copy_gigabytes": 60.0}, {"copy_gigabytes": 65.0})
        {'copy_gigabytes': 65.0}
    """
    return {name: max(rate, other.get(name, 0.0)) for name, rate in one.items()}


def arithmetic(ceilings: dict[str, float], dtype: str) -> tuple[str, float] | None:
    """Return the name and rate of the highest arithmetic ceiling for inputs of a dtype, or None without any."""
    kinds = ["dot_bfloat16", "packed_gemm_bfloat16", "gemm_bfloat16"] if dtype == "bfloat16" else []
    names = [*kinds, "fma_float32", "packed_gemm_float32", "gemm_float32"]
    known = {name: ceilings[name] for name in names if name in ceilings}
    if not known:
        return None
    name = max(known, key=lambda name: known[name])
    return name, known[name]
