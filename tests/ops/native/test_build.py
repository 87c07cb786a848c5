"""Compiling the kernels: what is built, what is not built again, and what is said without a compiler."""

import subprocess
import sys
from pathlib import Path

import pytest

from support.source_tree import ROOT

sys.path.insert(0, str(ROOT / "csrc"))

import build  # (csrc/build.py)


def test_without_a_compiler_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="no-such-compiler cannot be run; install g"):
        build.find_compiler()


def test_installing_without_a_compiler_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(tmp_path)]
    pytest.importorskip("setuptools")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "installed without native kernels" in done.stderr
    assert list(tmp_path.rglob("*.so")) == []


def test_a_build_makes_a_library_and_keeps_the_objects(tmp_path: Path) -> None:
    try:
        build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    made = build.build(tmp_path / "lib", ["generic"], only=["runtime.cpp"], objects=tmp_path / "objects")
    assert [path.name for path in made] == ["libkimi_linear_generic.so"]
    objects = {path: path.stat().st_mtime_ns for path in (tmp_path / "objects").iterdir()}
    build.build(tmp_path / "lib", ["generic"], only=["runtime.cpp"], objects=tmp_path / "objects")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "objects").iterdir()} == objects


def test_a_source_that_does_not_compile_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXXFLAGS", "-no-such-flag")
    try:
        build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    with pytest.raises(build.BuildError, match="no-such-flag"):
        build.build(tmp_path / "lib", ["generic"], only=["runtime.cpp"], objects=tmp_path / "objects")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
