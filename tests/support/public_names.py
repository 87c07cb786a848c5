"""The names users rely on: what the package and its operators export, and the commands. Run it to record them anew.

python tests/support/public_names.py
"""

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from support.source_tree import ROOT, SOURCE

RECORD = ROOT / "tests" / "architecture" / "public_names.txt"
HEADER = "# Public names, one a line. Recorded by: python tests/support/public_names.py"
MODULES = ("kimi_linear", "kimi_linear.ops", "kimi_linear.compat.fla")
COMMANDS = "kimi_linear.cli.main"


def _exists(module: str) -> bool:
    path = SOURCE.joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def exported(module: str) -> list[str]:
    """Return a module's `__all__`, sorted."""
    return sorted(importlib.import_module(module).__all__)


def commands() -> list[str]:
    """Return the names of the commands of the command line, sorted."""
    import typer

    group = typer.main.get_command(importlib.import_module(COMMANDS).app)
    return sorted(group.commands)  # type: ignore[attr-defined]


def current() -> dict[str, list[str]]:
    """Return the names of every public surface there is."""
    surfaces = {name: exported(name) for name in MODULES if _exists(name)}
    if _exists(COMMANDS):
        surfaces["commands"] = commands()
    return surfaces


def render(surfaces: dict[str, list[str]]) -> str:
    """Return the text of the record."""
    return "\n\n".join([HEADER, *("\n".join([f"[{name}]", *names]) for name, names in surfaces.items())]) + "\n"


def parse(text: str) -> dict[str, list[str]]:
    """Return the surfaces of a record."""
    surfaces: dict[str, list[str]] = {}
    names: list[str] = []
    for line in text.splitlines():
        if line.startswith("["):
            names = surfaces.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            names.append(line)
    return surfaces


if __name__ == "__main__":
    RECORD.write_text(render(current()), encoding="utf-8")
    print(f"wrote {RECORD.relative_to(ROOT)}")
