"""The repository's own furniture: test folders mirror the source, make targets work, the build runs what people run."""

import re
import subprocess

import pytest

from support.source_tree import ROOT

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = re.findall(r"^([a-z-]+):(?!=)", MAKEFILE, re.MULTILINE)


def test_tests_mirror_the_source() -> None:
    """A folder of tests that mirrors no layer and is no shared one is a typing error."""
    layers = {"base", "ops", "text", "nn", "models", "checkpoint", "training", "conversion", "inference", "evaluation"}
    outer = {"recipes", "cli", "integrations", "compat"}
    shared = {"architecture", "benchmarks", "contracts", "examples", "golden", "support"}
    folders = {path.parent.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").glob("*/**/*.py")}
    assert folders <= layers | outer | shared


def test_no_test_folder_is_a_package() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_every_make_target_is_phony_and_explained() -> None:
    explained = re.findall(r"^([a-z-]+):.*##", MAKEFILE, re.MULTILINE)
    phony = re.search(r"^\.PHONY:(.*)$", MAKEFILE, re.MULTILINE)
    assert phony is not None
    assert set(TARGETS) == set(explained) == set(phony.group(1).split())


@pytest.mark.parametrize("target", TARGETS)
def test_make_can_plan_every_target(target: str) -> None:
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_build_runs_check_and_test() -> None:
    assert {"make check", "make test"} <= set((ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines())
