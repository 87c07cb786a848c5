"""Every environment variable this package reads, with its type, default and meaning."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kimi_linear.base.errors import ConfigError


def _one_of(*names: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise ValueError(text)
        return text

    return parse


def _flag(text: str) -> bool:
    if text.lower() in {"1", "true", "yes", "on"}:
        return True
    if text.lower() in {"0", "false", "no", "off", ""}:
        return False
    raise ValueError(text)


@dataclass(frozen=True)
class Variable:
    """One environment variable."""

    parse: Callable[[str], Any]
    default: Any
    expected: str
    meaning: str


_LEVELS = ("generic", "avx2", "avx512", "avx512_bf16")

VARIABLES: dict[str, Variable] = {
    "KIMI_LINEAR_DEBUG": Variable(
        _flag, False, "0 or 1", "check values too (every log decay <= 0), at the price of a pass over them"
    ),
    "KIMI_LINEAR_BACKEND": Variable(
        str, "", "a backend's name, or empty", "the backend every operator must use unless the call names one"
    ),
    "KIMI_LINEAR_CPU_LEVEL": Variable(
        _one_of("auto", "off", *_LEVELS),
        "auto",
        f"auto, off, {', '.join(_LEVELS)}",
        "the instruction level of the native CPU kernels; off goes without them",
    ),
    "KIMI_LINEAR_KEEP_MEMORY": Variable(
        _flag,
        True,
        "0 or 1",
        "let the process keep freed blocks of up to 32 MiB once native kernels are loaded, and ask torch to put large "
        "tensors on huge pages; 0 leaves memory as it is",
    ),
    "KIMI_LINEAR_TRITON_SEGMENTS": Variable(
        _flag,
        True,
        "0 or 1",
        "let the delta rule's GPU kernels cut long sequences of few heads into segments that run side by side; with 0 "
        "a sequence's bits are the same whatever else is in the call",
    ),
    "KIMI_LINEAR_TRITON_KEEP": Variable(
        _one_of("inputs", "factors", "states"),
        "inputs",
        "inputs, factors, states",
        "what the delta rule's GPU kernels keep from forward to backward: the inputs alone, or what they computed of "
        "each chunk too, or the states entering the chunks as well",
    ),
    "KIMI_LINEAR_CPU_LIBRARIES": Variable(
        str, "", "a directory, or empty", "where the libraries of native CPU kernels are, if not in the package"
    ),
}


def read(name: str) -> Any:
    """Return the value of a variable of the table, parsed; a bad value is a ConfigError."""
    variable = VARIABLES[name]
    text = os.environ.get(name)
    if text is None:
        return variable.default
    try:
        return variable.parse(text)
    except ValueError as error:
        raise ConfigError(f"{name} is {text!r}, expected {variable.expected}: {variable.meaning}.") from error


def ask_for_huge_pages() -> None:
    """Let torch put large tensors on huge pages, if no tensor was made yet and the user has not said otherwise.

    The page faults of tensors as long as a sequence can cost as much as the kernels that fill them.
    """
    if os.environ.get("KIMI_LINEAR_KEEP_MEMORY") != "0":
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


@contextmanager
def changed(name: str, value: str) -> Iterator[None]:
    """Give a variable of the table another value for the length of a with-statement, for the whole process."""
    assert name in VARIABLES, name
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def triton_interprets() -> bool:
    """Return whether triton was told to interpret kernels on the CPU, which is for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def with_variables(**changes: str) -> dict[str, str]:
    """Return this process's environment with variables of the table changed, for a child process."""
    assert changes.keys() <= VARIABLES.keys(), changes
    return {**os.environ, **changes}
