"""What the machine can do, measured in the same run: memory read and copied, products in bfloat16 and tf32."""

import statistics
from collections.abc import Callable

import torch

from gpu.setting import Setting
from gpu.timing import Call

# More than any L2; and a product large enough for every multiprocessor.
BYTES, SIDE = 2**32, 8192
TINY_BYTES, TINY_SIDE = 2**16, 64


def measure(setting: Setting) -> dict[str, float]:
    """Return the ceilings in GB/s and TFLOP/s, each the best of a few rounds on random numbers."""
    clock = setting.clock()

    def best(call: Call) -> float:
        clock.times(call, 3)
        return min(statistics.median(clock.times(call, 5)) for _ in range(3))

    return {**memory(setting, best), **products(setting, best)}


def memory(setting: Setting, best: Callable[[Call], float]) -> dict[str, float]:
    """Return the GB/s of a copy, read plus written, and of a sum."""
    size = BYTES if setting.on_gpu else TINY_BYTES
    source = setting.normal(size // 4)
    target = torch.empty_like(source)
    copy, read = best(lambda _: target.copy_(source)), best(lambda _: source.sum())
    return {"copy_gigabytes": 2 * size / copy / 1e6, "read_gigabytes": size / read / 1e6}


def products(setting: Setting, best: Callable[[Call], float]) -> dict[str, float]:
    """Return the TFLOP/s of square products in bfloat16, and in float32 through tf32."""
    side, found = SIDE if setting.on_gpu else TINY_SIDE, {}
    for name, dtype in (("bfloat16", torch.bfloat16), ("tf32", torch.float32)):
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        a, b = (setting.normal(side, side, dtype=dtype) for _ in range(2))
        found[f"gemm_{name}"] = 2 * side**3 / best(lambda _, a=a, b=b: a @ b) / 1e9
    torch.backends.cuda.matmul.allow_tf32 = False
    return found
