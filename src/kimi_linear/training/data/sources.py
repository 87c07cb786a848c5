"""Where documents come from: the shipped text by name, or a user's file or directory, split into training and held-out.

A split is by whole documents. In a user's data a document is held out by a digest of its text, so equal documents
never part, the choice needs no pass over the data, and adding documents moves no other.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kimi_linear.base.errors import DataError
from kimi_linear.training.data.corpus import Split, check_split, corpus_digest, load_addresses
from kimi_linear.training.data.readers import READERS

BUILT_IN = "sotu"
HELD_OUT_ONE_IN = 16


class EmptySplitError(DataError):
    """The source holds documents, but none of them in the split asked for."""


@dataclass(frozen=True)
class TextSource:
    """Documents of one split of one source; iterate as often as needed, always in the same order.

    Args:
        location: "sotu" for the text that ships with the package (write "./sotu" for a file of that name); else the
            path of a .txt, .jsonl or .parquet file, or of a directory searched for those in sorted order (hidden files
            left out).
        split: "train", "validation" or "all". Of a user's documents one in sixteen is held out, never the first.
        text_field: Field (.jsonl) or column (.parquet) that holds the text.

    Raises:
        ConfigError: The split is unknown.
        DataError: On iteration: missing, unreadable, undecodable or empty, in one sentence with path and line.
        EmptySplitError: On iteration: no document falls into the split; give a file for that split.

    Example:
        >>> next(iter(TextSource("sotu", split="validation")))[:29]
        'Fellow-Citizens of the Senate'
    """

    location: str
    split: Split = "all"
    text_field: str = "text"

    def __post_init__(self) -> None:
        check_split(self.split)

    def __iter__(self) -> Iterator[str]:
        if self.location == BUILT_IN:
            yield from (address.text for address in load_addresses(self.split))
            return
        num_documents = num_chosen = 0
        first = b""
        for document in self._documents():
            digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
            first = first or digest
            # The first document (and its copies) always trains, so that a single file can be trained on.
            held_out = digest != first and int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0
            num_documents += 1
            if self.split == "all" or held_out == (self.split == "validation"):
                num_chosen += 1
                yield document
        if num_documents == 0:
            raise DataError(f"{self.location} holds no text; give a file that is not empty.")
        if num_chosen == 0:
            raise EmptySplitError(
                f"{self.location} holds {num_documents} documents and none falls into the {self.split} split, which "
                f"takes one in {HELD_OUT_ONE_IN}; give a separate file for {self.split}."
            )

    def fingerprint(self) -> str:
        """Return a digest that changes when the documents may have: content for "sotu", else names, sizes and times.

        Raises:
            DataError: A file is missing.
        """
        if self.location == BUILT_IN:
            identity: list[object] = [corpus_digest()]
        else:
            root = Path(self.location)
            identity = [[str(file.relative_to(root)), *_size_and_time(file)] for file in self._files()]
        described = json.dumps([self.split, self.text_field, HELD_OUT_ONE_IN, identity])
        return hashlib.sha256(described.encode()).hexdigest()

    def _files(self) -> list[Path]:
        root = Path(self.location)
        if not root.exists():
            raise DataError(f"{root} does not exist; give {BUILT_IN!r}, or the path of a file or directory.")
        if not root.is_dir():
            if root.suffix not in READERS:
                raise DataError(f"{root} has the suffix {root.suffix!r}, expected one of {', '.join(READERS)}.")
            return [root]
        files = sorted(file for file in root.rglob("*") if file.suffix in READERS and _is_visible(file, root))
        if not files:
            raise DataError(f"{root} holds no file that ends in {', '.join(READERS)}; give a directory that does.")
        return files

    def _documents(self) -> Iterator[str]:
        for file in self._files():
            yield from READERS[file.suffix](file, self.text_field)


def _is_visible(file: Path, root: Path) -> bool:
    """Return whether this is a file, and neither it nor a folder on the way from the root is hidden."""
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)


def _size_and_time(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns
