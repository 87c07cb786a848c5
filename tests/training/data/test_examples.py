import doctest
import importlib

import pytest

MODULES = ("batches", "compression", "corpus", "prepare", "shards", "sources", "validation")


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"kimi_linear.training.data.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
