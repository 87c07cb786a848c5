"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
from pathlib import Path

import pytest
import torch

from support.source_tree import Module, modules

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
WITH_EXAMPLES = [m for m in modules() if ">>> " in m.text]


@pytest.mark.parametrize("module", WITH_EXAMPLES, ids=lambda m: m.name)
def test_the_examples_of_a_module_run(module: Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    result = doctest.testmod(importlib.import_module(module.name), optionflags=FLAGS)
    assert result.failed == 0
    assert result.attempted > 0, "the examples stand where doctest does not look, so nothing runs them"
