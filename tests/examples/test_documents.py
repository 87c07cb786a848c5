"""The Python in Markdown files runs, and the commands they show exist."""

import doctest
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch

from kimi_linear.ops import native
from support import markdown
from support.source_tree import ROOT, tracked_files

# A fence without a language shows commands more often than not.
SHELL = {"bash", "sh", "shell", "console", ""}
PROGRAMS = ("make ", "kimi-linear ", "python ")
DOCUMENTS = [path for path in tracked_files() if path.suffix == ".md"]
WITH_PYTHON = [p for p in DOCUMENTS if any(b.language == "python" for b in markdown.read_blocks(p))]
WITH_SHELL = [p for p in DOCUMENTS if any(b.language in SHELL for b in markdown.read_blocks(p))]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def run_block(block: markdown.Block, document: str, namespace: dict[str, object]) -> None:
    """Run a block in a namespace shared by the blocks of its document; one with prompts runs as a doctest."""
    if ">>> " in block.text:
        test = doctest.DocTestParser().get_doctest(block.text, namespace, document, document, block.line)
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        runner.run(test, clear_globs=False)
        namespace.update(test.globs)
        assert runner.summarize(verbose=False).failed == 0
        return
    # Empty lines in front make the line numbers of a traceback those of the document.
    exec(compile("\n" * (block.line - 1) + block.text, document, "exec"), namespace)


@pytest.mark.parametrize("document", WITH_PYTHON, ids=name)
def test_the_python_of_a_document_runs(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in markdown.read_blocks(document):
        lacks = (block.native and native.why_unavailable()) or (
            block.package is not None and importlib.util.find_spec(block.package) is None
        )
        if block.language == "python" and block.not_run is None and not lacks:
            run_block(block, name(document), namespace)


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def program_options() -> dict[str, set[str]]:
    """Return the options of every command of `kimi-linear`."""
    import typer

    from kimi_linear.cli.main import app

    group = typer.main.get_command(app)
    commands = group.commands.items()  # type: ignore[attr-defined]
    return {name: {opt for p in command.params for opt in [*p.opts, *p.secondary_opts]} for name, command in commands}


def complaint(command: str) -> str | None:
    """Return what is wrong with a command a document shows, or None; programs of others are not judged."""
    if not command.startswith(PROGRAMS):
        return None
    words = shlex.split(command, comments=True)
    if words[:1] == ["make"]:
        unknown = [word for word in words[1:] if "=" not in word and word not in make_targets()]
        return f"make has no target {unknown}" if unknown else None
    if words[:1] == ["kimi-linear"] and len(words) > 1 and not words[1].startswith("-"):
        options = program_options()
        if words[1] not in options:
            return f"kimi-linear has no command {words[1]!r}"
        given = {word.split("=")[0] for word in words[2:] if word.startswith("--")}
        unknown = sorted(given - options[words[1]] - {"--help"})
        return f"kimi-linear {words[1]} has no option {unknown}" if unknown else None
    scripts = [word for word in words if re.fullmatch(r"[\w/]+\.py", word)]
    missing = [script for script in scripts if words[0].startswith("python") and not (ROOT / script).is_file()]
    return f"there is no {missing}" if missing else None


@pytest.mark.parametrize("document", WITH_SHELL, ids=name)
def test_the_commands_of_a_document_exist(document: Path) -> None:
    shown = [c for b in markdown.read_blocks(document) if b.language in SHELL for c in markdown.commands(b)]
    assert [c for c in map(complaint, shown) if c is not None] == []


def test_the_check_sees_a_command_that_does_not_exist() -> None:
    assert complaint("make tests") == "make has no target ['tests']"
    assert complaint("python benchmarks/none.py") == "there is no ['benchmarks/none.py']"
    assert complaint("make test PYTHON=python3.12  # both") is None
    assert complaint("anyone's else's program") is None


LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s#]+)[^)]*\)|!\[[^\]]*\]\((?P<image>[^)\s]+)\)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_to_files_lead_somewhere(document: Path) -> None:
    text = re.sub(r"```.*?```|`[^`]*`", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [match["target"] or match["image"] for match in LINK.finditer(text)]
    local = [target for target in targets if not re.match(r"[a-z]+:", target)]
    assert [target for target in local if not (document.parent / target).exists()] == []


def test_blocks_are_found_with_their_language_and_line() -> None:
    text = 'a\n```python not-run="too large"\nx = 1\n```\n\n```console\n$ make demo\ntrained\n```\n'
    first, second = markdown.blocks(text)
    assert (first.language, first.text, first.line, first.not_run) == ("python", "x = 1\n", 3, "too large")
    assert markdown.commands(second) == ["make demo"]


def test_a_failing_block_fails_with_the_documents_line() -> None:
    block = markdown.Block("python", "x = 1\nraise ValueError(x)\n", 10, None)
    with pytest.raises(ValueError, match="1") as caught:
        run_block(block, "README.md", {})
    assert caught.traceback[-1].lineno + 1 == 11
    prompts = markdown.Block("python", ">>> 1 + 1\n3\n", 10, None)
    with pytest.raises(AssertionError):
        run_block(prompts, "README.md", {})
