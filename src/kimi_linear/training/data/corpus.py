"""The text that ships with the package: 233 State of the Union addresses, 1790 to 2021, public domain.

`corpus/ORIGIN.md` states where it comes from, its licence and what was changed. The file is JSON lines (year,
president, text; in order of year) under xz, read with the standard library alone.
"""

import hashlib
import json
import lzma
from dataclasses import dataclass
from importlib import resources
from typing import Literal, get_args

from kimi_linear.base.errors import ConfigError, DataError

Split = Literal["all", "train", "validation"]

CORPUS_FILE = "sotu.jsonl.xz"
HELD_OUT_CYCLE = 13
HELD_OUT_REMAINDER = 10


@dataclass(frozen=True, kw_only=True)
class Address:
    """One address: the year it was given, the president's name, and its text on a single line."""

    year: int
    president: str
    text: str


def is_held_out(year: int) -> bool:
    """Return whether the addresses of a year belong to the validation split: year mod 13 = 10.

    The rule is by year, so two addresses of one year (1953, 1961: outgoing and incoming president) never part. A
    cycle of 13 shares no factor with the four-year term, so the held-out years walk through every year of a term
    and every era. Of the 13 remainders, 10 shares the least text with the training side (presidents quote each
    other and themselves): the build script measures it.

    Example:
        >>> [year for year in range(1950, 2022) if is_held_out(year)]
        [1960, 1973, 1986, 1999, 2012]
    """
    return year % HELD_OUT_CYCLE == HELD_OUT_REMAINDER


def check_split(split: str) -> None:
    """Raise ConfigError unless `split` is "all", "train" or "validation"."""
    if split not in get_args(Split):
        raise ConfigError(f"split is {split!r}, expected one of {', '.join(get_args(Split))}.")


def load_addresses(split: Split = "all") -> tuple[Address, ...]:
    """Return the addresses of one split, in order of year.

    Args:
        split: "train", "validation" (every year for which `is_held_out` holds), or "all".

    Returns:
        The addresses; 11 MB of text for "all".

    Raises:
        DataError: The shipped file is missing or damaged.

    Cost: about half a second, for decompression.

    Example:
        >>> first = load_addresses()[0]
        >>> first.year, first.president
        (1790, 'George Washington')
    """
    check_split(split)
    packed = _corpus_bytes()
    try:
        lines = lzma.decompress(packed).splitlines()
    except lzma.LZMAError as error:
        raise DataError(f"the shipped text {CORPUS_FILE} is damaged ({error}); install the package again.") from error
    addresses = [Address(**json.loads(line)) for line in lines]
    return tuple(a for a in addresses if split == "all" or is_held_out(a.year) == (split == "validation"))


def corpus_digest() -> str:
    """Return the SHA-256 of the shipped file, in hexadecimal."""
    return hashlib.sha256(_corpus_bytes()).hexdigest()


def _corpus_bytes() -> bytes:
    file = resources.files("kimi_linear.training.data") / "corpus" / CORPUS_FILE
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(
            f"the shipped text {CORPUS_FILE} cannot be read ({error}); install the package again."
        ) from error
