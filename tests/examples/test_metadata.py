"""The version, the licence and the name are the same wherever they stand."""

import re
import tomllib

import kimi_linear
from support.source_tree import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CITATION = (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def field(name: str) -> str:
    """Return a field at the top level of the citation file."""
    match = re.search(rf'^{name}: "?([^"\n]+)"?$', CITATION, re.MULTILINE)
    assert match is not None, name
    return match.group(1)


def test_the_version_is_the_same_everywhere() -> None:
    assert kimi_linear.__version__ == PROJECT["version"] == field("version")


def test_the_licence_is_the_same_everywhere() -> None:
    assert field("license") == PROJECT["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0" in text
    assert "LICENSE" in PROJECT["license-files"]


def test_the_citation_names_the_paper_of_the_architecture() -> None:
    assert field("cff-version") == "1.2.0"
    assert "2510.26692" in CITATION


def test_the_package_is_marked_as_typed() -> None:
    assert (ROOT / "src" / "kimi_linear" / "py.typed").is_file()
