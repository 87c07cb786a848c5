"""The operators' contracts on the GPU: which suites there are, and running them in processes of their own."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu.machine import ROOT

# The delta rule first, then what only a GPU shows, then its contracts in full.
FIRST = (
    "tests/ops/delta_rule/test_triton.py",
    "tests/ops/delta_rule/test_triton_device.py",
    "tests/contracts/test_delta_rule_decode.py",
    "tests/models/test_triton.py",
)
LAST = ("tests/contracts/test_delta_rule.py", "tests/contracts/test_delta_rule_compile.py")
# Not about kernels on a GPU: other backends' operators, on tensors of the CPU.
LEFT_OUT = "not (opcheck and not triton) and not decode_compiles and not one_compilation"
MARK = "ops.TRITON"
PROCESSES = 8
# xdist's own sentence for a test whose process ended; one that lost the GPU has written a better one.
CRASH = "crashed while running"


def suites(root: Path = ROOT) -> list[str]:
    """Return the test files that run Triton kernels, most important first."""
    own = [path for path in sorted((root / "tests" / "ops").rglob("test_*.py")) if MARK in path.read_text("utf-8")]
    found = [str(path.relative_to(root)) for path in own]
    return [*FIRST, *(name for name in found if name not in FIRST), *LAST]


def missing(root: Path = ROOT) -> list[str]:
    """Return what is wrong with the list: a suite that is not there, an operator with kernels and without a suite."""
    known = suites(root)
    absent = [f"there is no {name}" for name in known if not (root / name).is_file()]
    folders = {path.parents[1].name for path in (root / "src" / "kimi_linear" / "ops").glob("*/triton/backend.py")}
    tested = {Path(name).parent.name for name in known}
    return absent + [f"no suite runs the kernels of {name}" for name in sorted(folders - tested)]


@dataclass
class Outcome:
    """What a file's tests did."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """The outcome in words."""
        parts = [f"{self.passed} passed"]
        parts += [f"{self.failed} failed"] if self.failed else []
        return ", ".join(parts + ([f"{self.skipped} skipped"] if self.skipped else []))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for the record; of many failures the first."""
        counts = {"passed": self.passed, "failed": self.failed, "skipped": self.skipped}
        return {**counts, "seconds": round(self.seconds, 1), "failures": self.failures[:20]}


def read(log: Path) -> dict[str, Outcome]:
    """Return the outcome of every file from the lines of a run; a test counts once, its failure before anything."""
    tests: dict[str, dict[str, Any]] = {}
    for text in log.read_text("utf-8").splitlines() if log.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            # A process was stopped in the middle of a line.
            continue
        if line["test"] not in tests or (line["outcome"] == "failed" and CRASH not in line["reason"]):
            tests[line["test"]] = line
    found: dict[str, Outcome] = {}
    for name, line in tests.items():
        outcome = found.setdefault(name.partition("::")[0], Outcome())
        counts = Counter({line["outcome"]: 1})
        outcome.passed += counts["passed"]
        outcome.failed += counts["failed"]
        outcome.skipped += counts["skipped"]
        outcome.seconds += line["seconds"]
        if line["outcome"] == "failed":
            outcome.failures.append(f"{name.partition('::')[2] or name}: {line['reason']}")
    return found


def command(paths: list[str], processes: int) -> list[str]:
    """Return the call of pytest; a warning of another torch or numpy is no failure here."""
    options = ["-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-p", "gpu.pytest_plugin", "-W", "default"]
    options += ["--continue-on-collection-errors", "-k", LEFT_OUT]
    options += ["-n", str(processes)] if processes > 1 else []
    return [sys.executable, "-m", "pytest", *options, *paths]


def processes_for(cores: int | None) -> int:
    """Return how many processes may run tests side by side: 1 without pytest-xdist."""
    if importlib.util.find_spec("xdist") is None:
        return 1
    return max(1, min(PROCESSES, (cores or 1) // 2))


def environment(log: Path, device: str) -> dict[str, str]:
    """Return the environment of the tests."""
    paths = [str(ROOT / "src"), str(ROOT / "benchmarks"), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "KIMI_LINEAR_TEST_DEVICE": device,
        "GPU_CHECK_LOG": str(log),
        # What deterministic algorithms ask of cuBLAS.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }


def run(paths: list[str], seconds: float, device: str = "cuda") -> tuple[dict[str, Outcome], str]:
    """Run suites within a time limit; return each file's outcome, and what kept the whole from its end, or "".

    Without pytest-xdist each file has a process of its own, one after the other: a GPU that is lost in one is back in
    the next.
    """
    if importlib.util.find_spec("pytest") is None:
        return {}, "pytest is not installed here: no contract was run"
    count = processes_for(os.cpu_count())
    jobs = [paths] if count > 1 else [[path] for path in paths]
    with tempfile.TemporaryDirectory() as name:
        log, printed = Path(name) / "log", Path(name) / "printed"
        until, problem = time.monotonic() + seconds, ""
        for job in jobs:
            code = wait_for(command(job, count), environment(log, device), printed, until - time.monotonic())
            if code is None:
                problem = f"stopped after {seconds:.0f} s"
                break
            # 0 and 1: tests ran; 5: none was selected.
            if code not in (0, 1, 5):
                lines = printed.read_text("utf-8", errors="replace").strip().splitlines()
                problem = f"pytest ended with {code}: {lines[-1] if lines else 'it said nothing'}"
        return read(log), problem


def wait_for(call: list[str], variables: dict[str, str], printed: Path, seconds: float) -> int | None:
    """Run a program within a time limit; return its exit status, or None where it and all it started was ended."""
    with printed.open("w") as file:
        child = subprocess.Popen(
            call, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=variables, start_new_session=True
        )
    try:
        return child.wait(max(0.1, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        return None
