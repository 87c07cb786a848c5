"""No number without a green test: the operators' tests and contracts run first."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/ops", "tests/contracts/test_delta_rule.py", "tests/contracts/test_delta_rule_decode.py")
# A rough picture trusts the operator it is about.
QUICK_TESTS = ("tests/ops/delta_rule", "tests/contracts/test_delta_rule.py")
# What pytest says when nothing was selected.
NOTHING_SELECTED = 5


@dataclass(frozen=True)
class Verdict:
    """Whether the tests passed, whether there were none, and what they printed last if they failed."""

    green: bool
    empty: bool
    output: str


def run_tests(*options: str, paths: tuple[str, ...] = TESTS) -> Verdict:
    """Run the tests; a path that is not there is a failure, because it is what would have been trusted."""
    missing = [path for path in paths if not (ROOT / path).exists()]
    if missing:
        return Verdict(green=False, empty=False, output=f"there is no {', '.join(missing)}")
    command = [sys.executable, "-m", "pytest", "-x", "--no-header", "-p", "no:cacheprovider", *options, *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    empty = done.returncode == NOTHING_SELECTED
    tail = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
    return Verdict(green=done.returncode == 0, empty=empty, output="" if done.returncode == 0 else tail)
