"""Build the documents of the offline evaluation tasks that ship with the package; run again, it makes the same bytes.

    python scripts/build_eval_tasks.py [DIRECTORY]

The passages come from the held-out addresses (public domain), everything else from a seeded generator.
"""

import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from kimi_linear.base.files import atomic_file
from kimi_linear.training.data import load_addresses

OUTPUT = Path(__file__).resolve().parents[1] / "src/kimi_linear/integrations/lm_eval/tasks"
DOCUMENTS = 200
# Words of a passage in front of the word to guess, at least.
PASSAGE_WORDS = 60
LETTERS = "abcdefghijklmnopqrstuvwxyz"

Document = dict[str, str]
T = TypeVar("T")


class Draw:
    """A seeded source of picks, on `random.random` alone: its numbers are the same in every version of Python."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def below(self, limit: int) -> int:
        """Return a number from 0 to limit - 1."""
        return int(self._random.random() * limit)

    def one(self, items: Sequence[T]) -> T:
        """Return one of the items."""
        return items[self.below(len(items))]

    def some(self, items: Sequence[T], count: int) -> list[T]:
        """Return that many different items, in random order."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(count)]


def last_words() -> Iterator[Document]:
    """Yield passages of the held-out text that end in a word of five letters or more, which stood in them before."""
    passages = [passage for address in load_addresses("validation") for passage in _passages(address.text)]
    for context, target in Draw(1).some(passages, DOCUMENTS):
        yield {"context": context, "target": target}


def _passages(text: str) -> list[tuple[str, str]]:
    """Return (passage, last word) pairs that do not overlap; a passage is as many whole sentences as it needs."""
    passages = []
    sentences: list[list[str]] = []
    for sentence in re.split(r"(?<=[.?!]) ", text):
        sentences.append(sentence.split())
        while sum(map(len, sentences[1:])) > PASSAGE_WORDS:
            del sentences[0]
        words = [word for each in sentences for word in each]
        last = re.fullmatch(r"([A-Za-z]{5,})[.?!]", words[-1]) if len(words) > PASSAGE_WORDS else None
        if last and last[1] in words[:-1]:
            passages.append((" ".join(words[:-1]), last[1]))
            sentences = []
    return passages


def recall() -> Iterator[Document]:
    """Yield 4, 8 or 16 pairs of a key and a value, and a key whose value is asked for."""
    draw = Draw(2)
    for index in range(DOCUMENTS):
        count = (4, 8, 16)[index % 3]
        keys, values = draw.some(LETTERS, count), [str(draw.below(10)) for _ in range(count)]
        asked = draw.below(count)
        pairs = "".join(f"{key} {value}, " for key, value in zip(keys, values, strict=True))
        yield {"context": f"{pairs}{keys[asked]}", "target": values[asked]}


def copies() -> Iterator[Document]:
    """Yield 4 to 16 words of three letters, to be written once more; one copied example stands in front."""
    draw = Draw(3)
    for index in range(DOCUMENTS):
        example, words = (
            " ".join("".join(draw.one(LETTERS) for _ in range(3)) for _ in range(count))
            for count in (4, 4 + index % 13)
        )
        yield {"context": f"Text: {example}\nCopy: {example}\n\nText: {words}\nCopy:", "target": words}


def arithmetic() -> Iterator[Document]:
    """Yield sums, differences and products of small numbers, behind two solved ones of the same kind."""
    draw = Draw(4)
    for index in range(DOCUMENTS):
        solved = [_solved(draw, "+-x"[index % 3]) for _ in range(3)]
        shown = "".join(f"{question} = {answer}\n" for question, answer in solved[:2])
        yield {"context": f"{shown}{solved[2][0]} =", "target": solved[2][1]}


def _solved(draw: Draw, sign: str) -> tuple[str, str]:
    limit = 12 if sign == "x" else 100
    a, b = draw.below(limit), draw.below(limit)
    if sign == "-":
        a, b = max(a, b), min(a, b)
    answer = {"+": a + b, "-": a - b, "x": a * b}[sign]
    return f"{a} {sign} {b}", str(answer)


FILES = {"last_word": last_words, "recall": recall, "copy": copies, "arithmetic": arithmetic}


def build(directory: Path) -> None:
    """Write every file of documents into a directory."""
    for name, documents in FILES.items():
        with atomic_file(directory / f"{name}.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(document) + "\n" for document in documents()), encoding="utf-8")


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT)
