"""The peak memory of a training step, in a process of its own: what it holds at most, less what it held before.

python -m kimi_linear.recipes.bench.memory '{"model": "300m", "tokens": 8192, "arithmetic": "bf16"}'
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kimi_linear.base import env
from kimi_linear.nn.decoder import checkpoint_blocks
from kimi_linear.recipes.bench.engine import Engine, build, named_config
from kimi_linear.recipes.bench.record import Row


def resident(field: str = "VmRSS") -> int:
    """Return VmRSS or VmHWM (the peak) of this process in bytes; Linux only."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def training_peak(model: str, tokens: int, arithmetic: str, recompute: bool = False) -> dict[str, Any]:
    """Return the bytes that a training step adds at its peak, gradients included, and the bytes of the weights.

    To be run with KIMI_LINEAR_KEEP_MEMORY=0: memory that the process kept from its first, short step would be missing.
    """
    engine = Engine(build(named_config(model)), None)
    if recompute:
        checkpoint_blocks(engine.model.model)
    # Starts the threads and loads what is loaded on first use.
    engine.train(1, 64, arithmetic)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = resident()
    seconds = engine.train(1, tokens, arithmetic)
    weights = sum(p.nbytes for p in engine.model.parameters())
    return {"bytes": resident("VmHWM") - before, "weights": weights, "seconds": seconds}


def measure(
    model: str, tokens: int, arithmetic: str = "fp32", *, recompute: bool = False, timeout: float = 300.0
) -> Row:
    """Return the row of a training step of one sequence, measured in a fresh process."""
    case = {"tokens": tokens, "arithmetic": arithmetic, "recompute": recompute}
    row = Row("memory", "kimi-linear", case, "GiB")
    if sys.platform != "linux":
        row.reason = "resident memory is read from /proc"
        return row
    given = json.dumps({"model": model, "threads": torch.get_num_threads(), **case})
    command = [sys.executable, "-m", "kimi_linear.recipes.bench.memory", given]
    try:
        changed = env.with_variables(KIMI_LINEAR_KEEP_MEMORY="0")
        done = subprocess.run(command, env=changed, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        row.reason = f"stopped after {timeout:.0f} s"
        return row
    if done.returncode != 0:
        row.reason = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        return row
    found = json.loads(done.stdout)
    row.values, row.extra = [found["bytes"] / 2**30], {"weight_bytes": found["weights"], "seconds": found["seconds"]}
    return row


def rows(model: str, quick: bool) -> Iterator[Row]:
    """Yield the rows of a run: a short step, and a long one in both arithmetics and with recomputed blocks."""
    if quick:
        yield measure(model, 512)
        return
    for tokens in (1024, 2048, 8192):
        yield measure(model, tokens)
        yield measure(model, tokens, recompute=True)
    yield measure(model, 8192, "bf16")


def main(argument: str) -> None:
    """Print what a step takes, for the process that asked."""
    given = json.loads(argument)
    if threads := given.pop("threads", None):
        torch.set_num_threads(threads)
    print(json.dumps(training_peak(**given)))


if __name__ == "__main__":
    main(sys.argv[1])
