import errno
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from kimi_linear.base import files
from kimi_linear.base.files import atomic_directory, atomic_file
from support.source_tree import SOURCE


class PlugPulled(BaseException):
    """Not an Exception, as KeyboardInterrupt and SystemExit are not."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def visible(folder: Path) -> list[str]:
    return [name for name in names(folder) if not name.startswith(".")]


def write_directory(target: Path, content: str) -> None:
    with atomic_directory(target) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "a.txt").write_text(content)
        (temporary / "sub" / "b.txt").write_text(content)


def interrupt(writer: AbstractContextManager[Path], error: BaseException) -> None:
    """Write half of something, then fail."""
    with writer as temporary:
        (temporary / "a.txt" if temporary.is_dir() else temporary).write_text("half")
        raise error


def python(code: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter of its own, which it may kill."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_file_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.txt"
    for content in ("first", "second"):
        with atomic_file(target) as temporary:
            temporary.write_text(content)
            assert temporary.parent == target.parent
            assert not target.exists() or target.read_text() == "first"
        assert target.read_text() == content
    assert names(target.parent) == ["a.txt"]


def test_a_directory_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "new" / "checkpoint"
    write_directory(target, "first")
    (target / "stale.txt").write_text("from the first")
    write_directory(target, "second")
    assert names(target) == ["a.txt", "sub"]
    assert (target / "sub" / "b.txt").read_text() == "second"
    assert names(target.parent) == ["checkpoint"]


@pytest.mark.parametrize(
    "error", [ValueError("wrong"), KeyboardInterrupt(), PlugPulled()], ids=lambda e: type(e).__name__
)
def test_an_error_inside_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(type(error)):
        interrupt(atomic_file(target), error)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    "error", [ValueError("wrong"), KeyboardInterrupt(), PlugPulled()], ids=lambda e: type(e).__name__
)
def test_an_error_inside_leaves_the_old_directory_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "checkpoint"
    write_directory(target, "old")
    with pytest.raises(type(error)):
        interrupt(atomic_directory(target), error)
    assert (target / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["checkpoint"]


def test_nothing_written_is_an_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(FileNotFoundError), atomic_file(target):
        pass
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from kimi_linear.base.files import {manager}
    with {manager}(Path(sys.argv[1])) as temporary:
        {write}
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_killed_inside_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    done = python(KILLED.format(manager="atomic_file", write='temporary.write_text("half")'), target)
    assert done.returncode == -signal.SIGKILL
    assert target.read_text() == "old"
    assert visible(tmp_path) == ["a.txt"]


def test_a_process_killed_inside_leaves_the_old_directory(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    write_directory(target, "old")
    write = '(temporary / "a.txt").write_text("half")'
    done = python(KILLED.format(manager="atomic_directory", write=write), target)
    assert done.returncode == -signal.SIGKILL
    assert (target / "a.txt").read_text() == "old"
    assert (target / "sub" / "b.txt").read_text() == "old"
    assert visible(tmp_path) == ["checkpoint"]


# The kernel refuses the write half-way, as it does on a full disk.
LIMITED = """
    import resource, signal, sys
    from pathlib import Path
    from kimi_linear.base.files import {manager}
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        with {manager}(Path(sys.argv[1])) as temporary:
            {path}.write_bytes(b"x" * 100_000)
    except OSError as error:
        print(error.errno)
"""


@pytest.mark.parametrize(("manager", "path"), [("atomic_file", "temporary"), ("atomic_directory", '(temporary / "a")')])
def test_a_write_the_kernel_refuses_half_way_leaves_nothing(tmp_path: Path, manager: str, path: str) -> None:
    done = python(LIMITED.format(manager=manager, path=path), tmp_path / "target")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == errno.EFBIG
    assert names(tmp_path) == []


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_found_full_while_flushing_a_file_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems report a full disk only when the data is flushed."""
    monkeypatch.setattr(files, "fsync_file", full_disk)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)), atomic_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert names(tmp_path) == []


@pytest.mark.parametrize("step", ["fsync_file", "fsync_directory"])
def test_a_disk_found_full_while_flushing_a_directory_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setattr(files, step, full_disk)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        write_directory(tmp_path / "checkpoint", "new")
    assert names(tmp_path) == []


def test_contents_are_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(files, "fsync_file", lambda path: events.append(f"file {path.suffix}"))
    monkeypatch.setattr(files, "fsync_directory", lambda path: events.append(f"folder {(path / 'a.txt').exists()}"))
    with atomic_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("x")
    assert events == ["file .tmp", "folder True"]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    with atomic_file(target) as first, atomic_file(target) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert target.read_text() == "first"
    assert names(tmp_path) == ["a.txt"]


def test_a_failing_last_rename_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "checkpoint"
    target.mkdir()
    (target / "old").write_text("old")
    rename = Path.rename

    def refuse(self: Path, to: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError("no")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="no"), atomic_directory(target) as temporary:
        (temporary / "new").write_text("new")
    assert [file.name for file in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_failing_swap_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "checkpoint"
    write_directory(target, "old")
    rename = Path.rename

    def refuse_the_new_one(path: Path, to: Path) -> Path:
        if path.name.endswith(".tmp"):
            full_disk()
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", refuse_the_new_one)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        write_directory(target, "new")
    assert (target / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["checkpoint"]
