"""The modules of the GPU check; they find each other in the folder of benchmarks, as when run."""

import importlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from support.source_tree import ROOT

FOLDER = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def gpu() -> Iterator[SimpleNamespace]:
    before = set(sys.modules)
    names = [path.stem for path in (FOLDER / "gpu").glob("*.py") if path.stem != "__init__"]
    sys.path.insert(0, str(FOLDER))
    try:
        found = {name: importlib.import_module(f"gpu.{name}") for name in names}
        yield SimpleNamespace(**found, check=importlib.import_module("gpu_check"))
    finally:
        sys.path.remove(str(FOLDER))
        ours = {path.stem for path in FOLDER.glob("*.py")} | {"gpu"}
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in ours:
                del sys.modules[name]
