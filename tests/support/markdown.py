"""Fenced code blocks of Markdown files."""

import re
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^```(?P<info>[^`\n]*)\n(?P<body>.*?)^```\s*$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r'not-run="(?P<reason>[^"]+)"')


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, text and first line's number, why it is not run, if so, and what it needs."""

    language: str
    text: str
    line: int
    not_run: str | None
    native: bool = False
    package: str | None = None


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a text.

    A block that cannot run here says why on its fence: ```python not-run="downloads 98 GB". One that only runs with
    native kernels says ```python native, one that needs a package ```python needs=transformers.
    """
    found = []
    for match in _FENCE.finditer(text):
        info = match["info"].strip()
        reason = _NOT_RUN.search(info)
        line = text.count("\n", 0, match.start("body")) + 1
        words = _NOT_RUN.sub("", info).split() or [""]
        why = reason["reason"] if reason else None
        package = next((word.removeprefix("needs=") for word in words[1:] if word.startswith("needs=")), None)
        found.append(Block(words[0].lower(), match["body"], line, why, "native" in words[1:], package))
    return found


def commands(block: Block) -> list[str]:
    """Return the commands of a shell block: lines after a "$ " prompt or, where there is no prompt, every line."""
    lines = [line.strip() for line in block.text.replace("\\\n", " ").splitlines()]
    prompted = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    plain = [line for line in lines if line and not line.startswith("#")]
    return prompted or ([] if block.language in {"console", "text"} else plain)


def read_blocks(path: Path) -> list[Block]:
    """Return the fenced blocks of a file."""
    return blocks(path.read_text(encoding="utf-8"))
