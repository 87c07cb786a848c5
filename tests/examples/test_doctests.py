"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from kimi_linear.ops import native
from support.source_tree import Module, modules

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
# An example is read and tried; one that takes a minute belongs in `examples/`.
SECONDS = 60
# What only runs with native kernels.
NATIVE = {
    "kimi_linear.causal_lm.KimiLinearForCausalLM.prepare_for_inference",
    "kimi_linear.ops.linear.packed.PackedLinear",
}
WITH_EXAMPLES = [m for m in modules() if ">>> " in m.text]


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Fail when the block takes longer. By KeyboardInterrupt inside, because doctest goes on after an Exception."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt(f"the examples took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(seconds)
    try:
        yield
    except KeyboardInterrupt as error:
        pytest.fail(str(error))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("module", WITH_EXAMPLES, ids=lambda m: m.name)
def test_the_examples_of_a_module_run(module: Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found = [test for test in doctest.DocTestFinder().find(importlib.import_module(module.name)) if test.examples]
    assert found, "the examples stand where doctest does not look, so nothing runs them"
    run = [test for test in found if test.name not in NATIVE or native.why_unavailable() is None]
    if not run:
        pytest.skip(str(native.why_unavailable()))
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    with at_most(SECONDS):
        assert sum(runner.run(test).failed for test in run) == 0


def test_an_example_that_takes_too_long_fails() -> None:
    with pytest.raises(pytest.fail.Exception, match="the examples took more than 1 s"), at_most(1):
        time.sleep(5)
