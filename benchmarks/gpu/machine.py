"""What identifies a run: the GPU and its clocks, driver, torch, Triton and its assembler, the commit."""

import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu")


def output(*command: str) -> str:
    """Return what a program prints, or "" where it cannot."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """Return the short commit, with "-dirty" where tracked files differ from it; "" without git."""
    return output("git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude", "*")


def clocks() -> dict[str, str]:
    """Return clocks, power limit and temperature as the driver reports them now."""
    text = output("nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader", "--id=0")
    return dict(zip(CLOCKS, text.split(", "), strict=False)) if text else {}


def assembler() -> str:
    """Return the version of the assembler that Triton calls, or why there is none."""
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        path = get_ptxas(90).path
    except Exception as error:
        return f"unknown ({type(error).__name__})"
    found = re.search(r"V[\d.]+", output(path, "--version"))
    return found[0] if found else "unknown"


def installed(package: str) -> str:
    """Return a package's version, or "absent"."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def describe(commit_given: str = "") -> dict[str, Any]:
    """Return what identifies a run, as plain values."""
    facts: dict[str, Any] = {
        "commit": commit_given or commit() or "unknown",
        "torch": torch.__version__,
        "triton": installed("triton"),
        "fla": installed("fla-core"),
        "ptxas": assembler(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }
    if not torch.cuda.is_available():
        return {**facts, "gpu": "none", "machine": "no-gpu"}
    properties = torch.cuda.get_device_properties(0)
    facts |= {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2": getattr(properties, "L2_cache_size", 0),
        "capability": f"{properties.major}.{properties.minor}",
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "cuda": torch.version.cuda,
        "clocks": clocks(),
    }
    return {**facts, "machine": slug(properties.name)}


def slug(name: str) -> str:
    """Return a name for files: "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
