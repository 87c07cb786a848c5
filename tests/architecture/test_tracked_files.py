"""Nothing in the repository names a machine it was written on, or the package index it was installed from."""

import re

import pytest

from support.source_tree import ROOT, text_of, tracked_files

# A path into someone's home or workplace: an absolute path below one of these, not the middle of a longer one.
MACHINE_PATH = re.compile(r"(?<![\w.~}*-])/(?:home|root|work|Users|mnt|media|workspace)/\w")
# A package index or its mirror, by option or by address, and file:// addresses.
REGISTRY = re.compile(
    r"index-url[= ]+\S*//|--trusted-host|file:///\w|https?://[^/\s]*(?:pypi|npmjs|artifactory|nexus|proxy|mirror)\S*",
    re.IGNORECASE,
)
MAX_BYTES = 1_000_000
# Files that may hold such text, each with its reason.
ALLOWED = {"tests/architecture/test_tracked_files.py": "the patterns and their examples"}


def complaints(text: str) -> list[str]:
    """Return one entry for each line of a text that names a machine path or a package index."""
    lines = enumerate(text.splitlines(), start=1)
    return [
        f"line {n}: {line.strip()[:100]}" for n, line in lines if MACHINE_PATH.search(line) or REGISTRY.search(line)
    ]


def test_no_machine_paths_or_registry_hosts() -> None:
    found = {}
    for path in tracked_files():
        name = str(path.relative_to(ROOT))
        text = text_of(path)
        if text is not None and name not in ALLOWED and (lines := complaints(text)):
            found[name] = lines
    assert found == {}


@pytest.mark.parametrize(
    "line",
    [
        "cd /home/someone/project",
        'path = "/work/run"',
        "pip install --index-url https://example.org/simple torch",
        "https://pypi.example.org/simple/torch",
        "Looking in indexes: file:///opt/wheels",
    ],
)
def test_the_check_sees_a_path_or_a_host(line: str) -> None:
    assert complaints(line)


@pytest.mark.parametrize(
    "line", ["see https://example.org/home/page", "runs/demo/report.html", "B*T*HV/work/2", "a ~/home/x", "/tmp"]
)
def test_the_check_lets_pass_what_is_neither(line: str) -> None:
    assert not complaints(line)


def test_files_are_small_except_the_shipped_text() -> None:
    """Results, shards and checkpoints do not belong in the repository."""
    large = {p.relative_to(ROOT): p.stat().st_size for p in tracked_files() if p.stat().st_size > MAX_BYTES}
    assert [str(p) for p in large if "corpus" not in p.parts] == []


def test_no_backup_copies_or_build_outputs() -> None:
    wrong = [p for p in tracked_files() if p.suffix in {".orig", ".rej", ".bak", ".pyc", ".so", ".o", ".swp", ".pt"}]
    assert wrong == []
