"""How much more the native kernels train in the same time: the demonstration's own training, with and without them.

Each side runs in a process of its own, because kernels are chosen once in a process.
"""

import dataclasses
import json
import subprocess
import sys
from typing import Any

from kimi_linear.base import env
from kimi_linear.base.errors import KimiLinearError
from kimi_linear.ops.native import why_unavailable
from kimi_linear.recipes.train import training_speed


def compare(run_dir: str, seconds: float) -> dict[str, Any]:
    """Return tokens, seconds and precision of both sides, or why there is nothing to compare.

    Args:
        run_dir: Of a run whose data are prepared.
        seconds: Of each side.

    Returns:
        {"native": Speed, "plain": Speed} as plain values, or {"reason": why there are no native kernels}.

    Raises:
        KimiLinearError: One side failed; holds what it said.
    """
    reason = why_unavailable()
    if reason is not None:
        return {"reason": reason}
    return {
        "native": _in_a_process(run_dir, seconds, "auto"),
        "plain": _in_a_process(run_dir, seconds, "off"),
    }


def ratio(speed: dict[str, Any]) -> float:
    """Return how many times more tokens the native side trains on in the same time."""
    native, plain = speed["native"], speed["plain"]
    return float(native["tokens"] / native["seconds"] / (plain["tokens"] / plain["seconds"]))


def _in_a_process(run_dir: str, seconds: float, level: str) -> dict[str, Any]:
    code = "from kimi_linear.recipes.demo.speed import print_speed; print_speed()"
    command = [sys.executable, "-c", code, run_dir, str(seconds)]
    changed = env.with_variables(KIMI_LINEAR_CPU_LEVEL=level)
    done = subprocess.run(command, env=changed, capture_output=True, text=True)
    if done.returncode != 0:
        raise KimiLinearError(f"measuring the training speed at level {level!r} failed:\n{done.stderr}")
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def print_speed() -> None:
    """Measure the run and for the seconds that the command line names, and print one line of JSON."""
    print(json.dumps(dataclasses.asdict(training_speed(sys.argv[1], float(sys.argv[2])))))
