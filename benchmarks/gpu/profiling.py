"""Where a case's time goes: every kernel of ours, its time, and the bandwidth of the tensors it is given."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gpu import measure
from gpu.delta import OURS
from gpu.layers import KDA
from gpu.setting import Setting
from gpu.shapes import Case

CALLS = 10


@contextmanager
def traffic() -> Iterator[dict[str, list[int]]]:
    """Collect for every Triton kernel launched inside the bytes of the tensors it is given, a launch."""
    found: dict[str, list[int]] = defaultdict(list)
    try:
        from triton.runtime import JITFunction
    except ImportError:
        yield found
        return
    run = JITFunction.run

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        tensors = [x for x in (*args, *options.values()) if isinstance(x, torch.Tensor)]
        found[self.__name__].append(sum(x.numel() * x.element_size() for x in tensors))
        return run(self, *args, **options)

    JITFunction.run = counted
    try:
        yield found
    finally:
        JITFunction.run = run


def kernels(call: Callable[[int], object], calls: int, on_gpu: bool) -> list[tuple[str, float, float]]:
    """Return name, launches and microseconds a call of everything that ran, the longest first."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    with torch.profiler.profile(activities=kinds) as profiler:
        for index in range(calls):
            call(index)
        if on_gpu:
            torch.cuda.synchronize()
    rows = []
    for event in profiler.key_averages():
        on_device = str(getattr(event, "device_type", "")).endswith("CUDA")
        if on_device == on_gpu:
            taken = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            rows.append((event.key, event.count / calls, taken / calls))
    return sorted(rows, key=lambda row: -row[2])


def table(case: Case, setting: Setting, calls: int = CALLS) -> list[str]:
    """Return the table of a case, line by line."""
    contenders = measure.build(case, setting)
    call = contenders.calls.get(OURS) or contenders.calls[KDA]
    with traffic() as moved:
        call(0)
    # Warm: nothing compiles while it is watched.
    call(1)
    rows = kernels(call, calls, setting.on_gpu)
    total = sum(row[2] for row in rows)
    work = case.work()
    lines = [
        f"{case.key}: {total:.1f} us of kernels a call; fewest bytes {work.bytes:,.0f}, operations {work.flop:,.0f}"
    ]
    lines.append(f"{'kernel':60} {'launches':>8} {'us':>10} {'share':>6} {'MB given':>10} {'GB/s':>8}")
    for name, launches, taken in rows[:30]:
        # A kernel launched several times has the mean of its launches.
        given = sum(moved.get(name, ()))
        rate = f"{given / 1e6:10.1f} {given / taken / 1e3:8.0f}" if given and taken else f"{'':10} {'':8}"
        lines.append(f"{name[:60]:60} {launches:8.1f} {taken:10.1f} {100 * taken / max(total, 1e-9):5.1f}% {rate}")
    return lines
