"""Tell control tokens that a template writes from the same letters in a caller's text.

A chat template copies the caller's strings into a text that is then searched for control tokens. So each string is
first broken, by a mark, wherever a control token could come out of it: inside every control token it spells, and at an
end that another string or the template's own text could complete to one. What is found in the rendered text unbroken
was written by the template. Then the marks are removed. Beyond this is only a template that cuts something out of the
middle of a string and joins what is left without anything between.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from kimi_linear.base.errors import DataError

_LONGEST = 256
_PRIVATE_USE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE))


class ControlTokens:
    """The control tokens of one vocabulary, for marking strings and for cutting rendered text.

    Example:
        >>> tokens = ControlTokens(["<|end|>"])
        >>> tokens.mark("a <|end|> and <|e", "_")
        'a <_|end|> and <|e_'
        >>> list(tokens.split("a <_|end|> b<|end|>"))
        [('a <_|end|> b', False), ('<|end|>', True)]
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        # A token of one character cannot be broken, so none is read.
        known = sorted({token for token in tokens if len(token) > 1})
        if long := next((token for token in known if len(token) > _LONGEST), None):
            raise DataError(
                f"the control token {long[:40]!r}... has {len(long)} characters, expected {_LONGEST} at most."
            )
        # Case is ignored in what is marked, because a template may change it.
        self._starts = re.compile(_trie_pattern(known, lookahead=True), re.IGNORECASE | re.DOTALL)
        self._tokens = re.compile(f"({_trie_pattern(known)})")
        lowered = {token.lower() for token in known}
        self._prefixes = {token[:i] for token in lowered for i in range(1, len(token))}
        self._suffixes = {token[i:] for token in lowered for i in range(1, len(token))}
        self._longest = max(map(len, lowered), default=0)

    def mark(self, text: str, mark: str) -> str:
        """Return a text with the mark put wherever a control token could come out of it."""
        marked = self._starts.sub(lambda found: found.group() + mark, text)
        sizes = range(1, self._longest)
        before = mark if any(text[:size].lower() in self._suffixes for size in sizes) else ""
        after = mark if any(text[-size:].lower() in self._prefixes for size in sizes) else ""
        return before + marked + after

    def mark_all(self, value: Any, mark: str) -> Any:
        """Return plain values with every string in them marked, keys too."""
        if isinstance(value, str):
            return self.mark(value, mark)
        if isinstance(value, list):
            return [self.mark_all(item, mark) for item in value]
        if isinstance(value, dict):
            return {self.mark(key, mark): self.mark_all(item, mark) for key, item in value.items()}
        return value

    def split(self, text: str) -> Iterator[tuple[str, bool]]:
        """Yield the parts of a rendered text, each with whether it is a control token; no empty part."""
        for i, part in enumerate(self._tokens.split(text)):
            if part:
                yield part, i % 2 == 1


def unused_character(texts: Iterable[Any]) -> str:
    """Return a private-use character that occurs in none of some plain values.

    Raises:
        DataError: They use all 72,000.
    """
    used: set[str] = set()
    for text in _strings(list(texts)):
        used.update(text)
    for code in _PRIVATE_USE:
        if chr(code) not in used:
            return chr(code)
    raise DataError("the conversation uses every private-use character; remove one of them.")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)


def _trie_pattern(words: list[str], *, lookahead: bool = False) -> str:
    """Return a pattern for some words, the longest that fits first; with `lookahead`, for their first characters.

    Common beginnings are written once, so that a long text costs no search for each of hundreds of words.
    """
    if not words:
        return r"(?!)"
    tree: dict[str, dict] = {}
    for word in words:
        node = tree
        for character in word:
            node = node.setdefault(character, {})
        node[""] = {}
    if lookahead:
        return "|".join(f"{re.escape(first)}(?={_branches(node)})" for first, node in tree.items())
    return _branches(tree)


def _branches(node: dict[str, dict]) -> str:
    options = [re.escape(character) + _branches(child) for character, child in node.items() if character]
    if not options:
        return ""
    if len(options) == 1 and "" not in node:
        return options[0]
    return f"(?:{'|'.join(options)})" + ("?" if "" in node else "")
