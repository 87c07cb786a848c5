"""The table of backends in the docs is the registry's."""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_in_the_docs_is_current() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "support_table.py"))
    assert (ROOT / "docs" / "backends.md").read_text(encoding="utf-8") == script["table"]()
