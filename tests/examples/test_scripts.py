"""Every script in `examples/` runs as it stands, at toy size."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.source_tree import ROOT, SOURCE

SCRIPTS = sorted((ROOT / "examples").rglob("*.py"))


@pytest.mark.slow
def test_every_example_script_runs(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    for script in SCRIPTS:
        command = [sys.executable, "-W", "error", str(script)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{script.name}:\n{done.stderr}"
