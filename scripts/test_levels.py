"""Run the operator tests at every instruction level this processor has, and once without native kernels.

    python scripts/test_levels.py                                  what `make test-levels` runs
    python scripts/test_levels.py --levels avx2 off
    python scripts/test_levels.py --sanitize address,undefined     on libraries built with sanitizers; `make sanitize`

The levels not named by KIMI_LINEAR_CPU_LEVEL are what other machines have; their results may differ in the last bits,
their correctness may not.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from kimi_linear.ops.native import LEVELS, available_levels

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "csrc"))

import build  # noqa: E402  (csrc/build.py)

# The operators and their contracts: all that reaches a kernel.
TESTS = ("tests/ops", "tests/contracts", "tests/nn")
# Only tests that can reach a native kernel; the other backends do not know the level.
NATIVE_ONLY = "cpu or native or packed"


def sanitized(sanitize: str, levels: list[str]) -> dict[str, str]:
    """Build libraries with sanitizers; return the environment that runs them inside an ordinary Python."""
    folder = ROOT / "build" / f"sanitize-{sanitize.replace(',', '-')}"
    build.build(folder, levels, sanitize=sanitize)
    compiler = build.find_compiler().command
    runtimes = [
        subprocess.check_output([*compiler, f"-print-file-name={name}"], text=True).strip()
        for kind, name in (("address", "libasan.so"), ("undefined", "libubsan.so"))
        if kind in sanitize
    ]
    return {
        "KIMI_LINEAR_CPU_LIBRARIES": str(folder),
        "LD_PRELOAD": " ".join(runtimes),
        # Python and torch keep memory to the end; only what kernels do is of interest.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }


def main() -> int:
    """Run the tests level by level; return 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--levels", nargs="+", default=[*available_levels(), "off"], choices=[*LEVELS, "off"])
    parser.add_argument("--sanitize", default="", help="sanitizers, such as address,undefined")
    arguments = parser.parse_args()
    levels = [level for level in arguments.levels if not (arguments.sanitize and level == "off")]
    extra = sanitized(arguments.sanitize, levels) if arguments.sanitize else {}
    failed = []
    for level in levels:
        print(f"--- {level}{' with sanitizers' if extra else ''}", flush=True)
        # Without kernels everything runs: this is the suite of a machine without a compiler.
        select = [*TESTS, "-k", NATIVE_ONLY] if level != "off" else []
        command = [sys.executable, "-m", "pytest", "--numprocesses", "auto", *select]
        environment = {**os.environ, **extra, "KIMI_LINEAR_CPU_LEVEL": level}
        if subprocess.run(command, cwd=ROOT, env=environment).returncode != 0:
            failed.append(level)
    print(f"failed: {', '.join(failed)}" if failed else f"passed: {', '.join(levels)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
