import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, processors

from kimi_linear.base.errors import ConfigError, DataError
from kimi_linear.text import tokenizer as module
from kimi_linear.training.data import TextSource, Tokenizer

END = "<|endoftext|>"
# Trained once for the hypothesis tests, which must not use function fixtures.
TOKENIZER = Tokenizer.train(["the cat sat on the mat; don't it's 1990 café 東京 🙂\n\n  " * 20], vocab_size=400)
# Texts whose parts meet every branch of the cutting pattern.
PARTS = st.sampled_from(
    ["word", "don't", "1990", " ", "  ", "\n", "\r\n", "\t", "...", "_", "é", "e\u0301", "東", "🙂", END]
)
TEXTS = st.one_of(st.text(), st.lists(PARTS, max_size=60).map("".join))
QUICK = settings(deadline=None, max_examples=200)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TextSource("sotu", split="validation"), vocab_size=512)


@QUICK
@given(TEXTS)
def test_any_text_comes_back_exactly(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.token_lengths[ids].sum() == len(text.encode())
    assert TOKENIZER.eos_id not in ids


@QUICK
@given(TEXTS)
def test_cutting_a_long_text_changes_no_token(text):
    whole = TOKENIZER._backend.encode(text, add_special_tokens=False).ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE_CHARACTERS", 1)
        patch.setattr(module, "_GROUP_CHARACTERS", 7)
        assert TOKENIZER.encode(text) == whole


def test_long_texts_really_are_cut(monkeypatch):
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 10)
    assert list(module._pieces("twelve words in a row make a text long enough")) == [
        "twelve words",
        " in a row make",
        " a text long",
        " enough",
    ]


@QUICK
@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1)))
def test_decoding_equals_the_library(ids):
    expected = TOKENIZER._backend.decode(ids, skip_special_tokens=True)
    assert TOKENIZER.decode(ids, skip_special=True) == expected


@QUICK
@given(st.lists(TEXTS, max_size=8))
def test_batch_equals_one_by_one(texts):
    assert TOKENIZER.encode_batch(texts) == [TOKENIZER.encode(text) for text in texts]


def test_special_token_in_text_is_text_unless_asked():
    text = f"a{END}b"
    assert TOKENIZER.eos_id not in TOKENIZER.encode(text)
    ids = TOKENIZER.encode(text, parse_special=True)
    assert ids == [*TOKENIZER.encode("a"), TOKENIZER.eos_id, *TOKENIZER.encode("b")]
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode(ids, skip_special=True) == "ab"
    assert TOKENIZER.encode(text) == TOKENIZER.encode(text)


def test_a_prefix_may_end_inside_a_character():
    ids = TOKENIZER.encode("𝄞")
    assert len(ids) > 1
    assert TOKENIZER.decode(ids[:-1]) == "\ufffd"


def test_several_special_tokens_take_the_first_ids():
    trained = Tokenizer.train(["some text"], vocab_size=300, special_tokens=[END, "<|pad|>", "<|user|>"])
    assert trained.special_ids == {END: 0, "<|pad|>": 1, "<|user|>": 2}
    assert trained.eos_id == 0
    assert trained.token_lengths[:3].tolist() == [0, 0, 0]


def test_little_text_gives_fewer_tokens():
    assert Tokenizer.train(["ab"], vocab_size=4096).vocab_size == 258


def test_same_text_gives_the_same_file(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a.json")
    again = tmp_path / "b.json"
    script = (
        "from kimi_linear.training.data import TextSource, Tokenizer\n"
        f"Tokenizer.train(TextSource('sotu', split='validation'), vocab_size=512).save({str(again)!r})"
    )
    # Another process, another hash seed, and the library's thread pool on.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TOKENIZERS_PARALLELISM": "true"}
    subprocess.run([sys.executable, "-c", script], check=True, env={**environment, "PYTHONHASHSEED": "7"})
    assert again.read_bytes() == (tmp_path / "a.json").read_bytes()


def test_saved_tokenizer_loads_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "model")
    for path in (tmp_path / "model", tmp_path / "model" / "tokenizer.json", str(tmp_path / "model")):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode("The state of the Union") == tokenizer.encode("The state of the Union")
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json")).encode("the").ids


def test_fingerprint_depends_on_vocabulary_and_eos():
    special = {"special_tokens": [END, "<|x|>"], "vocab_size": 300}
    trained = Tokenizer.train(["some text"], **special)
    assert trained.fingerprint == Tokenizer.train(["some text"], **special).fingerprint
    assert trained.fingerprint != Tokenizer.train(["other text"], **special).fingerprint
    assert trained.fingerprint != Tokenizer(trained._backend, eos="<|x|>").fingerprint


def test_full_disk_leaves_the_old_file(tokenizer, tmp_path, monkeypatch):
    file = tmp_path / "tokenizer.json"
    file.write_text("old")

    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DataError, match=r"tokenizer\.json cannot be written: the disk is full"):
        tokenizer.save(file)
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_tokens_added_by_a_post_processor_are_left_out(tmp_path):
    backend = tokenizers.Tokenizer.from_str(TOKENIZER._backend.to_str())
    backend.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    backend.enable_truncation(2)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode("the cat sat") == TOKENIZER.encode("the cat sat")


def test_vocabulary_must_hold_the_bytes():
    with pytest.raises(ConfigError, match="vocab_size is 256, expected at least 257"):
        Tokenizer.train(["text"], vocab_size=256)


@pytest.mark.parametrize("special_tokens", [(), ("a", "a")])
def test_special_tokens_must_be_different_and_some(special_tokens):
    with pytest.raises(ConfigError, match="expected one or more different tokens"):
        Tokenizer.train(["text"], vocab_size=300, special_tokens=special_tokens)


@pytest.mark.parametrize("documents", [[], ["", ""]])
def test_training_needs_text(documents):
    with pytest.raises(DataError, match="there is no text"):
        Tokenizer.train(documents, vocab_size=300)


def test_missing_and_broken_files_are_one_sentence(tmp_path):
    file = tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match=r"tokenizer\.json does not exist"):
        Tokenizer.load(tmp_path)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path)
    file.write_text('{"version":')
    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_other_kinds_of_tokenizer_are_refused(tmp_path):
    backend = tokenizers.Tokenizer(models.WordLevel({"the": 0, "cat": 1}, unk_token="the"))
    backend.add_special_tokens([END])
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"not a byte-level BPE: 256 of the 256 bytes"):
        Tokenizer.load(tmp_path)
    described = json.loads(TOKENIZER._backend.to_str())
    described["model"]["vocab"]["東"] = TOKENIZER.vocab_size
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(DataError, match="token '東' does not spell bytes"):
        Tokenizer.load(tmp_path)


def test_unknown_eos_is_refused(tmp_path):
    TOKENIZER.save(tmp_path)
    with pytest.raises(DataError, match=r"no special token '<s>'; it has: <\|endoftext\|>"):
        Tokenizer.load(tmp_path, eos="<s>")


@pytest.mark.parametrize("parse_special", [False, True])
def test_lone_surrogate_is_refused(parse_special):
    with pytest.raises(DataError, match=r"lone surrogate \(U\+D800\)"):
        TOKENIZER.encode("a\ud800", parse_special=parse_special)


@pytest.mark.parametrize("token", [-1, TOKENIZER.vocab_size])
def test_unknown_id_is_refused(token):
    with pytest.raises(DataError, match=f"token id {token} is outside the vocabulary of"):
        TOKENIZER.decode([token])


def test_forking_after_encoding_neither_hangs_nor_warns():
    script = (
        "import os\n"
        "from kimi_linear.training.data import Tokenizer\n"
        "tokenizer = Tokenizer.train(['some text'] * 100, vocab_size=300)\n"
        "tokenizer.encode_batch(['some text'] * 100)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(len(tokenizer.encode_batch(['some text'] * 7)))\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-W", "ignore", "-c", script]
    result = subprocess.run(command, check=True, env=environment, capture_output=True, timeout=60)
    assert result.stderr == b""


def test_shipped_text_is_spelled_exactly(tokenizer):
    documents = list(TextSource("sotu", split="validation"))
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(documents)] == documents
