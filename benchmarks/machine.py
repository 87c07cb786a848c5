"""What the machine is, and how fast it can be: the ceilings operators are held against, measured in the same run."""

import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
# The instruction sets that decide how fast a matrix product can be.
FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")


def cpu() -> dict[str, Any]:
    """Return the processor's name and the instruction sets that matter here."""
    name, flags = platform.processor() or platform.machine(), set()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        text = info.read_text()
        if match := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
            name = match.group(1)
        if match := re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE):
            flags = set(match.group(1).split())
    return {"name": name, "flags": [flag for flag in FLAGS if flag in flags]}


def commit() -> str:
    """Return the short commit, with "-dirty" where tracked files differ from it; "unknown" without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10", "--exclude", "*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def slug(name: str, cores: int) -> str:
    """Return a name for files: "amd-epyc-2-cores"."""
    plain = re.sub(r"\(.*?\)|@.*", " ", name.lower())
    words = re.sub(r"[^a-z0-9]+", " ", plain).split()
    return "-".join([*words[:5], str(cores), "core" if cores == 1 else "cores"])


def fastest(call: Callable[[], object], seconds: float) -> float:
    """Return the median time of a call, over at least three calls and about `seconds`."""
    call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def gemm_rate(dtype: torch.dtype, shape: tuple[int, int, int], batch: int, seconds: float) -> float:
    """Return GFLOP/s of batched products [batch, m, k] x [batch, k, n]."""
    m, k, n = shape
    a, b = torch.randn(batch, m, k, dtype=dtype), torch.randn(batch, k, n, dtype=dtype)
    out = torch.empty(batch, m, n, dtype=dtype)
    return 2e-9 * batch * m * k * n / fastest(lambda: torch.bmm(a, b, out=out), seconds)


def copy_rate(seconds: float, size: int = 2**28) -> float:
    """Return GB/s read plus written by a copy larger than the caches."""
    source, target = torch.ones(size // 4), torch.zeros(size // 4)
    return 2e-9 * size / fastest(lambda: target.copy_(source), seconds)


def ceilings(seconds: float = 1.0) -> dict[str, float]:
    """Measure the ceilings, about `seconds` each."""
    return {
        "gemm_float32": gemm_rate(torch.float32, (2048, 2048, 2048), 1, seconds),
        "gemm_bfloat16": gemm_rate(torch.bfloat16, (2048, 2048, 2048), 1, seconds),
        "batched_gemm_float32": gemm_rate(torch.float32, (64, 128, 128), 256, seconds),
        "batched_gemm_bfloat16": gemm_rate(torch.bfloat16, (64, 128, 128), 256, seconds),
        "copy_gigabytes": copy_rate(seconds),
    }


def describe() -> dict[str, Any]:
    """Return what identifies a run: machine, software, commit."""
    processor = cpu()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "machine": slug(processor["name"], cores),
        "cpu": processor["name"],
        "flags": processor["flags"],
        "cores": cores,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "load": os.getloadavg()[0],
    }


if __name__ == "__main__":
    print(describe())
    print({name: round(rate, 1) for name, rate in ceilings().items()})
