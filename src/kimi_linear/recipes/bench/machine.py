"""What identifies a run: the machine and the software, as plain values for the record."""

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kimi_linear.ops import native

# The instruction sets that decide how fast a matrix product can be.
FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")


def cpu() -> dict[str, Any]:
    """Return the processor's name and the instruction sets that matter here."""
    name, flags = platform.processor() or platform.machine(), set()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        text = info.read_text(encoding="utf-8")
        if match := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
            name = match.group(1)
        if match := re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE):
            flags = set(match.group(1).split())
    return {"name": name, "flags": [flag for flag in FLAGS if flag in flags]}


def slug(name: str, cores: int) -> str:
    """Return a name for files: "amd-epyc-2-cores"."""
    plain = re.sub(r"\(.*?\)|@.*", " ", name.lower())
    words = re.sub(r"[^a-z0-9]+", " ", plain).split()
    return "-".join([*words[:5], str(cores), "core" if cores == 1 else "cores"])


def memory_bytes(field: str = "MemTotal") -> int:
    """Return a figure of /proc/meminfo in bytes, or 0 where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return 0
    fields = dict(line.split(":", 1) for line in meminfo.read_text(encoding="utf-8").splitlines())
    return int(fields[field].split()[0]) * 1024


def describe() -> dict[str, Any]:
    """Return what identifies a run: machine, software, and how busy the machine is."""
    processor = cpu()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "machine": slug(processor["name"], cores),
        "cpu": processor["name"],
        "flags": processor["flags"],
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory": memory_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kimi_linear": version("kimi-linear"),
        "native": native.active_level() or f"none: {native.why_unavailable()}",
        "load": round(os.getloadavg()[0], 2),
    }
