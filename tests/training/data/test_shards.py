import errno
import json

import numpy as np
import pytest
import tokenizers
from tokenizers import normalizers

from kimi_linear.base.errors import DataError
from kimi_linear.training.data import TextSource, Tokenizer, TokenShards, prepare, prepare_shards

# Word-sized documents, so that a shard of twenty tokens holds one or several.
WORDS = tuple(f"word{i} " * (i % 5 + 1) for i in range(50))


@pytest.fixture
def full_disk(monkeypatch):
    """Make every write after the third fail as on a full disk."""

    class Full:
        def __init__(self, file):
            self._file, self._writes = file, 0

        def write(self, content):
            self._writes += 1
            if self._writes > 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self._file.write(content)

        def close(self):
            self._file.close()

    real = prepare._ShardWriter._next_file
    monkeypatch.setattr(prepare._ShardWriter, "_next_file", lambda self: Full(real(self)))


def documents_of(shards, tokenizer):
    lengths = shards.document_tokens
    return [tokenizer.decode(shards.read(i, 0, int(lengths[i]))) for i in range(shards.num_documents)]


@pytest.mark.parametrize("shard_tokens", [1, 20, 10_000])
def test_documents_come_back_in_order(make_shards, tokenizer, shard_tokens):
    shards = make_shards(WORDS, shard_tokens=shard_tokens)
    assert documents_of(shards, tokenizer) == list(WORDS)
    files = len(list(shards.directory.glob("tokens-*.bin")))
    assert {1: files == len(WORDS), 20: 5 < files < len(WORDS), 10_000: files == 1}[shard_tokens]


def test_counts_are_exact(make_shards, tokenizer):
    shards = make_shards()
    tokens = tokenizer.encode_batch(TextSource(str(shards.directory) + ".jsonl"))
    assert shards.num_documents == len(tokens) == 7
    assert shards.document_tokens.tolist() == [len(ids) for ids in tokens]
    assert shards.num_tokens == sum(map(len, tokens))
    assert shards.num_bytes == sum(len(tokenizer.decode(ids).encode()) for ids in tokens)
    assert shards.bytes_per_token == shards.num_bytes / shards.num_tokens
    assert shards.token_lengths.tolist() == tokenizer.token_lengths.tolist()
    assert shards.manifest.eos_id == tokenizer.eos_id
    assert shards.manifest.tokenizer == tokenizer.fingerprint


def test_read_takes_a_stretch_and_stops_at_the_end(make_shards, tokenizer):
    shards = make_shards(WORDS, shard_tokens=5)
    ids = tokenizer.encode(WORDS[44])
    assert shards.read(44, 1, 3).tolist() == ids[1:3]
    assert shards.read(44, 2, 1000).tolist() == ids[2:]


def test_tokens_take_two_bytes_or_four(tmp_path, tokenizer):
    file = tmp_path / "a.txt"
    file.write_text("some text <65999>")
    backend = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str())
    backend.add_tokens([f"<{i}>" for i in range(66_000)])
    large = Tokenizer(backend)
    for chosen, dtype in ((tokenizer, "<u2"), (large, "<u4")):
        shards = prepare_shards(tmp_path / dtype, TextSource(str(file)), chosen)
        assert shards.manifest.dtype == dtype
        assert documents_of(shards, chosen) == ["some text <65999>"]
    assert shards.read(0, 0, 100).max() > 1 << 16


def test_tokens_are_mapped_not_read(make_shards):
    part = make_shards().read(3, 0, 5)
    assert isinstance(part, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        part[0] = 1


def test_same_inputs_are_reused_and_others_are_not(make_shards, tmp_path, tokenizer):
    first = make_shards(WORDS)
    source = TextSource(str(tmp_path / "tokens.jsonl"))
    before = (tmp_path / "tokens" / "manifest.json").stat()

    def prepared(source=source, tokenizer=tokenizer):
        prepare_shards(tmp_path / "tokens", source, tokenizer)
        return (tmp_path / "tokens" / "manifest.json").stat().st_ino

    assert prepared() == before.st_ino
    other = Tokenizer.train(["another vocabulary"], vocab_size=270)
    assert prepared(tokenizer=other) != before.st_ino
    assert TokenShards(tmp_path / "tokens").manifest.fingerprint != first.manifest.fingerprint
    (tmp_path / "tokens.jsonl").write_text('{"text": "changed"}\n')
    prepared()
    assert documents_of(TokenShards(tmp_path / "tokens"), tokenizer) == ["changed"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens", "tokens.jsonl"]


def test_progress_counts_the_bytes_of_every_document(make_shards):
    seen = []
    shards = make_shards(progress=seen.append)
    assert (len(seen), sum(seen)) == (shards.num_documents, shards.num_bytes)


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("name", ["tokens-00000.bin", "offsets.bin", "token_lengths.bin"])
def test_file_of_the_wrong_size_is_refused_and_made_again(make_shards, name, change):
    shards = make_shards()
    file = shards.directory / name
    content = file.read_bytes()
    file.write_bytes(content[:-1] if change < 0 else content + b"x")
    with pytest.raises(DataError, match=f"{name} has {len(content) + change} bytes, expected {len(content)}"):
        TokenShards(shards.directory)
    make_shards()
    assert file.read_bytes() == content


def test_missing_file_is_refused(make_shards):
    shards = make_shards()
    (shards.directory / "tokens-00000.bin").unlink()
    with pytest.raises(DataError, match=r"tokens-00000\.bin cannot be read"):
        TokenShards(shards.directory)


def test_damaged_offsets_are_refused(make_shards):
    shards = make_shards()
    offsets = np.fromfile(shards.directory / "offsets.bin", dtype="<i8")
    offsets[2] = offsets[1]
    (shards.directory / "offsets.bin").write_bytes(offsets.tobytes())
    with pytest.raises(DataError, match=r"offsets\.bin is damaged"):
        TokenShards(shards.directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "does not hold token shards of version 1"),
        ({"format": "else"}, "does not hold token shards of version 1"),
        ({"num_tokens": 5}, "contradicts itself"),
        ({"dtype": "<f4"}, "contradicts itself"),
        ({"shard_tokens": ["x"]}, "shard_tokens is .*, expected tuple"),
        ({"surprise": 1}, "unknown key 'surprise'"),
    ],
)
def test_damaged_manifest_is_refused(make_shards, change, message):
    manifest = make_shards().directory / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **change}))
    with pytest.raises(DataError, match=message):
        TokenShards(manifest.parent)
    manifest.write_text("{")
    with pytest.raises(DataError, match=r"does not hold token shards: .* not valid JSON"):
        TokenShards(manifest.parent)


def test_directory_without_shards_is_refused(tmp_path, tokenizer):
    with pytest.raises(DataError, match="does not hold token shards"):
        TokenShards(tmp_path / "gone")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="exists and does not hold token shards; choose another directory"):
        prepare_shards(tmp_path, TextSource("sotu"), tokenizer)
    with pytest.raises(DataError, match="choose another directory"):
        prepare_shards(tmp_path / "thesis.tex", TextSource("sotu"), tokenizer)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_empty_directory_is_used(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "tokens").mkdir()
    assert prepare_shards(tmp_path / "tokens", TextSource(str(tmp_path / "a.txt")), tokenizer).num_documents == 1


def test_full_disk_leaves_nothing(make_shards, tmp_path, full_disk):
    with pytest.raises(DataError, match="tokens cannot be written: the disk is full; free space"):
        make_shards()
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.jsonl"]


def test_full_disk_keeps_what_was_there(make_shards, tmp_path, tokenizer, request):
    make_shards(WORDS)
    request.getfixturevalue("full_disk")
    with pytest.raises(DataError, match="the disk is full"):
        make_shards()
    assert documents_of(TokenShards(tmp_path / "tokens"), tokenizer) == list(WORDS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens", "tokens.jsonl"]


def test_disk_full_while_flushing_leaves_nothing(make_shards, tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("kimi_linear.base.files.fsync_file", full)
    with pytest.raises(DataError, match="the disk is full"):
        make_shards()
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.jsonl"]


def test_place_that_cannot_be_written_is_one_sentence(tmp_path, tokenizer):
    (tmp_path / "file").write_text("text")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"cannot be written: .*; choose a place that can be written to"):
        prepare_shards(tmp_path / "file" / "tokens", TextSource(str(tmp_path / "a.txt")), tokenizer)


def test_bad_source_leaves_nothing(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": 1}\n')
    with pytest.raises(DataError, match="line 2"):
        prepare_shards(tmp_path / "tokens", TextSource(str(tmp_path / "a.jsonl")), tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_tokenizer_that_changes_text_is_refused(tmp_path, tokenizer):
    backend = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str())
    backend.normalizer = normalizers.NFC()
    file = tmp_path / "a.txt"
    file.write_text("cafe\u0301", encoding="utf-8")
    with pytest.raises(DataError, match="document 1 has 6 bytes but its tokens spell 5"):
        prepare_shards(tmp_path / "tokens", TextSource(str(file)), Tokenizer(backend))
