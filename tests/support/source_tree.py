"""The package's source as text and syntax trees: which module imports which, how long its functions are."""

import ast
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
PACKAGE = "kimi_linear"

_MODULE_NAME = re.compile(rf"{PACKAGE}(\.\w+)+")


@dataclass(frozen=True)
class Import:
    """One name a module imports: absolute, wherever in the file the statement stands."""

    line: int
    name: str


@dataclass(frozen=True)
class Function:
    """A function and its length in lines without its docstring, decorators included."""

    name: str
    line: int
    length: int


@dataclass(frozen=True)
class Module:
    """One Python file of a package."""

    name: str
    path: Path
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree, in the grammar of the oldest supported Python."""
        return ast.parse(self.text, filename=str(self.path), feature_version=(3, 11))

    @property
    def is_package(self) -> bool:
        """Whether the file is a package's `__init__`."""
        return self.path.name == "__init__.py"

    def imports(self) -> Iterator[Import]:
        """Yield every import: statements at any depth, `import_module("...")`, and modules named in strings.

        A string counts when all of it is the dotted name of a module (`"kimi_linear.nn.decoder"`), which is how tables
        of lazy imports are written.
        """
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (Import(node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute(node)
                yield from (Import(node.lineno, f"{base}.{alias.name}") for alias in node.names)
            elif isinstance(node, ast.Constant) and _is_module(node.value):
                yield Import(node.lineno, node.value)

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.name.split(".")
        # One dot is the package itself: for an ordinary module, one name less than its own.
        keep = len(parts) - node.level + (1 if self.is_package else 0)
        return ".".join([*parts[:keep], *([node.module] if node.module else [])])

    def functions(self) -> Iterator[Function]:
        """Yield every function and method, nested ones included."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                length = (node.end_lineno or node.lineno) - first + 1
                docstring = node.body[0]
                if ast.get_docstring(node, clean=False) is not None:
                    length -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
                yield Function(node.name, node.lineno, length)


def _is_module(value: object) -> bool:
    """Whether a constant is the dotted name of a module of the package."""
    if not isinstance(value, str) or not _MODULE_NAME.fullmatch(value):
        return False
    path = SOURCE.joinpath(*value.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def modules(source: Path = SOURCE) -> list[Module]:
    """Return every module under a source directory, by name."""
    found = []
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append(Module(name, path, path.read_text(encoding="utf-8")))
    return found


def tracked_files() -> list[Path]:
    """Return the files git tracks or would track, or every file beside the package where there is no git."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, check=True, capture_output=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        folders = ("src", "tests", "benchmarks", "docs", "examples")
        return sorted(p for f in folders for p in (ROOT / f).rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def text_of(path: Path) -> str | None:
    """Return a file's text, or None where it is binary."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text
