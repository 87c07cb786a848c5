"""Which tokenizers load, which token is taken to end a text, and what begins one."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from kimi_linear.base.errors import ConfigError, DataError
from kimi_linear.text.byte_level import byte_alphabet
from kimi_linear.text.tokenizer import Tokenizer
from support.released_text import released_tokenizer

END = "<|endoftext|>"


def save_foreign(directory: Path, **files: object) -> Path:
    """Write a tokenizer of another family: special tokens behind the bytes, one mark and one blank not special."""
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(byte_alphabet())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END, "<s>", "</s>"])
    backend.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("    ", normalized=False)])
    directory.mkdir(exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize(
    ("files", "eos"),
    [
        ({}, END),
        ({"tokenizer_config": {"eos_token": "</s>"}}, "</s>"),
        ({"tokenizer_config": {"eos_token": {"content": "</s>", "lstrip": False}}}, "</s>"),
        ({"tokenizer_config": {"eos_token": None}, "generation_config": {"eos_token_id": 257}}, "<s>"),
        ({"generation_config": {"eos_token_id": [3, 258, 257]}}, "</s>"),
        ({"generation_config": {"eos_token_id": "x"}, "config": {"eos_token_id": 258}}, "</s>"),
        ({"tokenizer_config": {"eos_token": "<s>"}, "config": {"eos_token_id": 258}}, "<s>"),
        ({"config": {"eos_token_id": True}}, END),
    ],
)
def test_eos_is_what_the_files_beside_say(tmp_path: Path, files: dict[str, object], eos: str) -> None:
    tokenizer = Tokenizer.load(save_foreign(tmp_path, **files))
    assert tokenizer.eos == eos
    assert tokenizer.names["eos_token"] == eos
    assert Tokenizer.load(tmp_path / "tokenizer.json").eos == eos
    assert Tokenizer.load(tmp_path, eos="<s>").eos == "<s>"


def test_saved_alone_a_tokenizer_keeps_its_eos_and_fingerprint(tmp_path: Path) -> None:
    """What a training run saves beside its shards must come back as the tokenizer that cut them."""
    tokenizer = Tokenizer.load(save_foreign(tmp_path / "a", tokenizer_config={"eos_token": "</s>"}))
    tokenizer.save(tmp_path / "b")
    assert Tokenizer.load(tmp_path / "b").fingerprint == tokenizer.fingerprint
    tokenizer.save(tmp_path / "c.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c.json"]


def test_saving_leaves_a_configuration_that_is_there(tmp_path: Path) -> None:
    config = {"eos_token": "</s>", "chat_template": "x"}
    Tokenizer.load(save_foreign(tmp_path, tokenizer_config=config)).save(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == config


def test_names_come_from_the_configuration(tmp_path: Path) -> None:
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": None, "unk_token": "<gone>"}
    assert Tokenizer.load(save_foreign(tmp_path, tokenizer_config=names)).names == {
        "bos_token": "<s>",
        "eos_token": "</s>",
    }


@pytest.mark.parametrize(
    ("content", "sentence"), [("[]", "expected an object"), ("{", "not valid JSON"), ("[" * 10**5, "nested deeper")]
)
def test_broken_files_beside_are_one_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    save_foreign(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ConfigError, match=sentence):
        Tokenizer.load(tmp_path)


def test_only_our_own_tokenizers_begin_a_text(tmp_path: Path) -> None:
    ours = Tokenizer.train(["some text"], vocab_size=300)
    assert ours.begin_ids == (0,)
    assert ours.end_ids == (0,)
    assert Tokenizer.load(save_foreign(tmp_path)).begin_ids == ()
    assert released_tokenizer().begin_ids == ()


def test_another_familys_marks_are_read_as_its_library_reads_them(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save_foreign(tmp_path))
    mark, blank = tokenizer.control_ids["<tool>"], 260
    assert tokenizer.special_ids.keys() == {END, "<s>", "</s>"}
    assert tokenizer.encode("<tool>    </s>")[:2] == [mark, blank]
    assert 258 not in tokenizer.encode("<tool>    </s>")
    plain = tokenizer.encode_plain("<tool>    </s>")
    assert plain == [*tokenizer.encode("<"), *tokenizer.encode("tool>"), blank, *tokenizer.encode("</s>")]
    assert tokenizer.decode(plain) == "<tool>    </s>"


def test_special_tokens_in_the_vocabulary_itself_can_be_dropped() -> None:
    """As our own training writes them, were they at the end."""
    vocabulary = {c: i for i, c in enumerate(byte_alphabet())} | {END: 256, "<pad>": 257}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.add_special_tokens([END, "<pad>"])
    tokenizer = Tokenizer(backend).limit(257)
    assert tokenizer.vocab_size == 257
    assert len(tokenizer.encode("<pad>", parse_special=True)) == 5
    with pytest.raises(DataError, match="no special token"):
        tokenizer.limit(256)
