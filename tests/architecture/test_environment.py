"""Environment variables are read in one place, from one table."""

import ast
import re
from pathlib import Path

import pytest

from kimi_linear.base import env
from support.source_tree import Module, modules

# Modules that may touch the environment themselves, each with its reason.
ALLOWED = {
    "kimi_linear.base.env": "the one place that reads it",
    "kimi_linear.checkpoint.hub": "where the model hub's own variables put its cache",
    "kimi_linear.text.tokenizer": "sets a variable of the tokenizers library before importing it",
}
ACCESS = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}


def environment_access(module: Module) -> list[int]:
    """Return the lines that touch the process's environment, however `os` was imported."""
    lines = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and node.attr in ACCESS:
            lines.append(node.lineno)
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            lines += [node.lineno for alias in node.names if alias.name in ACCESS]
    return lines


def test_the_environment_is_read_in_one_place() -> None:
    elsewhere = {m.name: environment_access(m) for m in modules() if m.name not in ALLOWED}
    assert {name: lines for name, lines in elsewhere.items() if lines} == {}


@pytest.mark.parametrize(
    "text", ["import os\nos.environ['A']", "import os as o\no.getenv('A')", "from os import environ\nenviron.get('A')"]
)
def test_the_check_sees_a_read(text: str) -> None:
    assert environment_access(Module("kimi_linear.ops.x", Path("x.py"), text))


def test_every_variable_named_in_the_source_is_in_the_table() -> None:
    named = {name for m in modules() for name in re.findall(r"\bKIMI_LINEAR_[A-Z0-9_]+", m.text)}
    assert named == set(env.VARIABLES)


def test_the_table_explains_every_variable() -> None:
    for name, variable in env.VARIABLES.items():
        assert name.isupper()
        assert variable.meaning
        assert variable.expected
