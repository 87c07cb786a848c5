"""The files beside a checkpoint's weights, read by transformers."""

import json
from pathlib import Path
from typing import Any

import pytest

from kimi_linear.base.errors import DataError
from kimi_linear.text.chat import ChatTemplate
from kimi_linear.text.files import write_tokenizer_files
from kimi_linear.text.messages import ToolCall
from kimi_linear.text.tokenizer import Tokenizer
from support.released_text import released_tokenizer, write_release

TOKENIZER = released_tokenizer()
CALL = ToolCall("functions.add:0", "add", '{"a": 1}')
CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Hello there, it's 12 o'clock!\n\n 東京 🙂"}]},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "1 + 1?"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL.to_message()]},
            {"role": "tool", "name": "add", "tool_call_id": CALL.id, "content": "2"},
            {"role": "assistant", "content": "<2>"},
        ],
        "tools": [{"function": {"name": "add", "parameters": {"é": [1, None, "'"]}}, "type": "function"}],
        "add_generation_prompt": False,
    },
]


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install 'kimi-linear[peers]'"
    )
    directory = tmp_path_factory.mktemp("checkpoint")
    write_tokenizer_files(TOKENIZER, ChatTemplate(), directory, model_max_length=1234)
    (directory / "config.json").write_text(json.dumps({"model_type": "kimi_linear"}))
    return transformers.AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("chat", CHATS, ids=["plain", "tools"])
def test_transformers_lays_out_the_same_tokens(peer: Any, chat: dict[str, Any]) -> None:
    ours = ChatTemplate().apply(chat["messages"], TOKENIZER, **{k: v for k, v in chat.items() if k != "messages"})
    options = {"add_generation_prompt": True, "tools": None} | {k: v for k, v in chat.items() if k != "messages"}
    theirs = peer.apply_chat_template(chat["messages"], tokenize=True, return_dict=False, **options)
    assert ours == list(theirs)


@pytest.mark.parametrize(
    "text", ["It's THE 1234th 東京タワー.\r\n\n  x <|im_end|>", "", " ", "[EOS]a<|tool_call_end|>"]
)
def test_transformers_reads_and_writes_the_same_tokens(peer: Any, text: str) -> None:
    ids = TOKENIZER.encode(text, parse_special=True)
    assert peer(text)["input_ids"] == ids
    assert peer.decode(ids) == text
    assert peer.decode(ids, skip_special_tokens=True) == TOKENIZER.decode(ids, skip_special=True)


def test_transformers_knows_the_special_tokens_and_the_length(peer: Any) -> None:
    named = {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    assert {name: getattr(peer, name) for name in named} == named == TOKENIZER.names
    assert peer.model_max_length == 1234
    assert len(peer) == TOKENIZER.vocab_size


def test_what_is_written_loads_as_it_was(tmp_path: Path) -> None:
    template = ChatTemplate("another {{ messages }}")
    write_tokenizer_files(TOKENIZER, template, tmp_path / "new")
    again = Tokenizer.load(tmp_path / "new")
    assert (again.fingerprint, again.names) == (TOKENIZER.fingerprint, TOKENIZER.names)
    assert ChatTemplate.load(tmp_path / "new").source == template.source
    (tmp_path / "new" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    write_release(tmp_path / "old")
    (tmp_path / "new" / "tiktoken.model").write_bytes((tmp_path / "old" / "tiktoken.model").read_bytes())
    assert Tokenizer.load(tmp_path / "new", vocab_size=TOKENIZER.vocab_size).fingerprint == TOKENIZER.fingerprint
    assert "model_max_length" not in (tmp_path / "new" / "tokenizer_config.json").read_text()


def test_a_tokenizer_without_a_chat_layout_has_two_files(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["a"], vocab_size=257)
    write_tokenizer_files(tokenizer, None, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write_tokenizer_files(TOKENIZER, None, tmp_path / "file")
