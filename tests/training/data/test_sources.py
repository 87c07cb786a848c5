import builtins
import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from kimi_linear.base.errors import ConfigError, DataError
from kimi_linear.training.data import EmptySplitError, TextSource, load_addresses
from kimi_linear.training.data.readers import READERS


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_parquet(path, columns, **options):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)


def read(path, **options):
    return list(TextSource(str(path), **options))


def test_shipped_text_by_name():
    for split in ("all", "train", "validation"):
        assert list(TextSource("sotu", split=split)) == [address.text for address in load_addresses(split)]


def test_text_file_is_one_document_exactly(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffcafé\r\n\r\n東京\n".encode())
    assert read(file) == ["café\r\n\r\n東京\n"]


def test_jsonl_is_one_document_a_line(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one\\ntwo", "id": 1}\n\n{"text": "\\u6771"}\n{"text": " "}\n{"text": "last"}')
    assert read(file) == ["one\ntwo", "東", "last"]


def test_parquet_is_one_document_a_row(tmp_path):
    file = tmp_path / "a.parquet"
    documents = [f"document {i}" for i in range(1000)]
    write_parquet(file, {"id": list(range(1000)), "text": documents}, row_group_size=300)
    assert read(file) == documents


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_field_is_configurable(tmp_path, kind):
    file = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_jsonl(file, [{"text": "no", "body": "yes"}])
    else:
        write_parquet(file, {"text": ["no"], "body": ["yes"]})
    assert read(file, text_field="body") == ["yes"]


def test_directory_is_read_in_sorted_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b" / "1.txt").write_text("third")
    write_jsonl(tmp_path / "a.jsonl", [{"text": "first"}, {"text": "second"}])
    (tmp_path / "c.txt").write_text("fourth")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden" / "x.txt").write_text("not data")
    assert read(tmp_path) == ["first", "second", "third", "fourth"]


def test_lines_are_streamed(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "first"}\nnot json\n')
    documents = iter(TextSource(str(file)))
    assert next(documents) == "first"
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: not valid JSON"):
        next(documents)


def test_split_keeps_documents_whole_and_copies_together(tmp_path):
    file = tmp_path / "a.jsonl"
    documents = [f"document number {i % 300}" for i in range(600)]
    write_jsonl(file, [{"text": document} for document in documents])
    train, validation = read(file, split="train"), read(file, split="validation")
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(documents)
    assert 0.02 < len(validation) / len(documents) < 0.12
    # Adding documents moves no other.
    write_jsonl(file, [{"text": document} for document in [*documents, "one more"]])
    assert set(validation) <= set(read(file, split="validation"))


@pytest.mark.parametrize("text", [f"single document {i}" for i in range(40)])
def test_first_document_always_trains(tmp_path, text):
    file = tmp_path / "a.txt"
    file.write_text(text)
    assert read(file, split="train") == [text]
    with pytest.raises(EmptySplitError, match="holds 1 documents and none falls into the validation split"):
        read(file, split="validation")


def test_fingerprint_follows_files_and_options(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("some text")
    source = TextSource(str(tmp_path))
    first = source.fingerprint()
    assert first == source.fingerprint()
    others = {
        TextSource(str(tmp_path), split="train").fingerprint(),
        TextSource(str(tmp_path), text_field="body").fingerprint(),
        TextSource("sotu").fingerprint(),
        TextSource("sotu", split="train").fingerprint(),
    }
    os.utime(file, ns=(1, 1))
    others.add(source.fingerprint())
    (tmp_path / "b.txt").write_text("more")
    others.add(source.fingerprint())
    assert len(others | {first}) == 7


def test_unknown_split_is_refused():
    with pytest.raises(ConfigError, match="split is 'test'"):
        TextSource("sotu", split="test")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt holds no text"),
        ("a.txt", b" \n\t", "a.txt holds no text"),
        ("a.txt", b"one\ntwo \xff\n", "a.txt, line 2: not UTF-8"),
        ("a.jsonl", b"\n", "a.jsonl holds no text"),
        ("a.jsonl", b'{"text": ""}', "a.jsonl holds no text"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}', "a.jsonl, line 2: not UTF-8"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": ', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'["text"]', "a.jsonl, line 1: a JSON list, expected an object with the field 'text'"),
        ("a.jsonl", b'{"body": "x", "id": 1}', "a.jsonl, line 1: no field 'text' .fields: 'body', 'id'."),
        ("a.jsonl", b'{"text": null}', "a.jsonl, line 1: field 'text' is NoneType, expected a string"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl, line 1: field 'text' holds a lone surrogate"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: not valid JSON"),
        ("a.parquet", b"PAR1 not really", "a.parquet is not a readable parquet file"),
        ("a.parquet", b"", "a.parquet is not a readable parquet file"),
        ("a.docx", b"x", "a.docx has the suffix '.docx', expected one of .txt, .jsonl, .parquet"),
    ],
)
def test_bad_file_is_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["x"], "id": [1]}, "has no column 'text'; its columns are: body, id"),
        ({"text": ["ok", None]}, "a.parquet, row 2: column 'text' is NoneType, expected a string"),
        ({"text": [1]}, "a.parquet, row 1: column 'text' is int, expected a string"),
        ({"text": [""]}, "a.parquet holds no text"),
    ],
)
def test_bad_parquet_is_one_sentence(tmp_path, columns, message):
    write_parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.parquet")


def test_truncated_parquet_is_one_sentence(tmp_path):
    file = tmp_path / "a.parquet"
    write_parquet(file, {"text": ["some text"] * 100})
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match="is not a readable parquet file"):
        read(file)


def test_damaged_parquet_data_is_one_sentence(tmp_path):
    file = tmp_path / "a.parquet"
    write_parquet(file, {"text": [f"some text {i}" for i in range(500)]}, compression="gzip")
    content = bytearray(file.read_bytes())
    content[4:200] = bytes(196)
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet (cannot be read|is not a readable parquet file): [^\n]+$"):
        read(file)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", {"text": ["x"]})
    real_import = builtins.__import__

    def without_pyarrow(name, *arguments, **options):
        if name.startswith("pyarrow"):
            raise ModuleNotFoundError("No module named 'pyarrow'")
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(DataError, match=r"needs pyarrow, .* pip install 'kimi-linear\[train\]'"):
        read(tmp_path / "a.parquet")


def test_missing_path_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match=r"gone\.txt does not exist"):
        read(tmp_path / "gone.txt")
    with pytest.raises(DataError, match=r"gone\.txt does not exist"):
        TextSource(str(tmp_path / "gone.txt")).fingerprint()


def test_directory_without_text_is_one_sentence(tmp_path):
    (tmp_path / "README.md").write_text("x")
    with pytest.raises(DataError, match=r"holds no file that ends in \.txt, \.jsonl, \.parquet"):
        read(tmp_path)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_unreadable_file_is_one_sentence(tmp_path, suffix):
    # A directory under a file's name cannot be read as one, whoever runs the tests.
    folder = tmp_path / f"a{suffix}"
    folder.mkdir()
    with pytest.raises(DataError, match=f"a{suffix} cannot be read"):
        list(READERS[suffix](folder, "text"))
