"""The released kind of tokenizer, from its file to its tokens, against the `tiktoken` package."""

import base64
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_linear.base.errors import ConfigError, DataError
from kimi_linear.text import tiktoken
from kimi_linear.text.byte_level import byte_alphabet
from kimi_linear.text.chat import ChatTemplate
from kimi_linear.text.tokenizer import Tokenizer
from support.released_text import CONTROL, learned_ranks, released_tokenizer, write_release

RANKS = learned_ranks()
WORDS = (
    "東京 中 々 the The THE McD it's IT'S I'LL we've d'oh '\u017f 1 12345 ٣٤ Ⅷ . ... !? <|im_end|> é e\u0301 \u0301 ﬁ ǅ"
)
OTHERS = "ª ʰ ア ไทย हिन्दी 🙂 👩\u200d👩\u200d👧 \u200d \ufeff \x00 _ -"
BLANKS = [" ", "  ", "\n", "\r\n", "\t", "\u3000", "\x85", "\u2028", " \n ", "   x"]
PARTS = st.sampled_from([*f"{WORDS} {OTHERS}".split(" "), *BLANKS])
TEXTS = st.one_of(st.text(max_size=60), st.lists(PARTS, max_size=40).map("".join))
QUICK = settings(deadline=None, max_examples=300)
BYTES = {bytes([byte]): byte for byte in range(256)}


def peer_ids(text: str, ranks: dict[bytes, int] = RANKS) -> list[int]:
    peer = pytest.importorskip("tiktoken", reason="tiktoken is not installed: pip install 'kimi-linear[peers]'")
    encoding = peer.Encoding("small", pat_str=tiktoken.PATTERN, mergeable_ranks=ranks, special_tokens={})
    return [id for piece in tiktoken.pieces(text) for id in encoding.encode_ordinary(piece)]


@QUICK
@given(TEXTS)
def test_tokens_are_those_of_tiktoken(text: str) -> None:
    ids = released_tokenizer().encode(text)
    assert ids == peer_ids(text)
    assert released_tokenizer().decode(ids) == text


@QUICK
@given(st.lists(st.binary(min_size=2, max_size=6), max_size=40), st.randoms(use_true_random=False), st.data())
def test_any_vocabulary_merges_as_in_tiktoken(tokens: list[bytes], rng, data) -> None:
    """Ranks in no order of growth, tokens that no merge reaches, and several ways to split one."""
    extra = [token for token in dict.fromkeys(tokens) if token not in BYTES]
    pairs = st.lists(st.sampled_from([*"abA", "aa", "aab", "ab", "ba", "bab", "abab"]), max_size=12)
    extra += [
        t for t in dict.fromkeys("".join(p).encode() for p in data.draw(st.lists(pairs, max_size=12))) if len(t) > 1
    ]
    extra = list(dict.fromkeys(extra))
    rng.shuffle(extra)
    ranks = BYTES | {token: 256 + i for i, token in enumerate(extra)}
    backend = tiktoken.build(ranks, [])
    for text in ("".join(p) for p in data.draw(st.lists(pairs, max_size=4))):
        assert backend.encode(text).ids == peer_ids(text, ranks)


def test_a_token_keeps_the_one_merge_its_bytes_lead_to() -> None:
    # "ab" merges before "bc", so "abc" can only come from "ab" and "c", though "a" and "bc" spell it too.
    ranks = BYTES | {b"ab": 256, b"bc": 257, b"abc": 258, b"xyz": 259}
    assert tiktoken._last_merge(b"abc", ranks) == (b"ab", b"c")
    assert tiktoken._last_merge(b"xyz", ranks) is None
    assert tiktoken.build(ranks, []).encode("xyz").ids == [259]


@pytest.mark.parametrize(
    "text",
    ["x" * 25_000, "x" * 25_001, " " * 75_001, "ab " * 140_000, "x" * 399_999 + "  y", "\n" * 50_000 + "é" * 60_000],
)
def test_long_text_is_cut_where_the_release_cuts_it(text: str) -> None:
    assert list(tiktoken.pieces(text)) == [
        p for start in range(0, len(text), 400_000) for p in _cut(text[start:][:400_000])
    ]


def _cut(text: str) -> list[str]:
    """Walk over the characters: a new piece where a run would grow past its limit."""
    pieces, begin, run = [], 0, 0
    for i, character in enumerate(text):
        run = run + 1 if i and character.isspace() == text[i - 1].isspace() else 1
        if run > 25_000:
            pieces.append(text[begin:i])
            begin, run = i, 1
    return [*pieces, text[begin:]]


@pytest.mark.parametrize("unit", ["The cat isn't 12 años.\n", " ", "x", "X", "🙂", "東", "\n", "e\u0301"])
def test_a_million_characters_come_back(unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    ids = released_tokenizer().encode(text)
    assert released_tokenizer().decode(ids) == text


def test_pieces_are_encoded_each_by_itself() -> None:
    pair = next(token.decode() for token in RANKS if len(token) == 2 and token.isalpha() and token.islower())
    # The cut after 25,000 characters falls into a token.
    text = "x" + pair * 15_000
    assert released_tokenizer().encode(text) == peer_ids(text)
    assert released_tokenizer().encode(text, parse_special=True) == peer_ids(text)
    assert released_tokenizer()._backend.encode(text).ids != peer_ids(text)
    assert released_tokenizer().encode_batch([text, "the"]) == [peer_ids(text), peer_ids("the")]


def test_a_directory_of_the_release_loads(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_release(tmp_path))
    first = len(RANKS)
    assert tokenizer.vocab_size == first + 258
    assert tokenizer.eos == "[EOS]"
    assert tokenizer.end_ids == (first + 1, first + 2, first + 9)
    assert tokenizer.begin_ids == ()
    assert tokenizer.names == {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    assert tokenizer.control_ids[f"<|reserved_token_{first + 257}|>"] == first + 257
    assert {text: tokenizer.control_ids[text] - first for text in CONTROL.values()} == {
        t: i for i, t in CONTROL.items()
    }


@pytest.mark.parametrize("token", [*CONTROL.values(), "<|reserved_token_705|>"])
def test_no_control_token_is_read_from_text_unless_asked(token: str) -> None:
    """Also those that are not flagged as special, which the library reads in every text."""
    tokenizer = released_tokenizer()
    assert tokenizer.encode(f"a{token}") == tokenizer.encode_plain(f"a{token}") == peer_ids(f"a{token}")
    assert tokenizer.encode(f"a{token}", parse_special=True) == [*peer_ids("a"), tokenizer.control_ids[token]]


def test_saved_as_tokenizer_json_it_stays_of_the_released_kind(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_release(tmp_path / "a"), vocab_size=len(RANKS) + 256)
    tokenizer.save(tmp_path / "b")
    again = Tokenizer.load(tmp_path / "b")
    assert again.fingerprint == tokenizer.fingerprint
    assert again.eos == "[EOS]"
    text = "y" * 25_001 + "<|tool_call_end|>"
    assert again.encode(text) == tokenizer.encode(text) == peer_ids(text)


def test_tokens_behind_the_models_rows_do_not_exist(tmp_path: Path) -> None:
    whole = Tokenizer.load(write_release(tmp_path))
    rows = len(RANKS) + 256
    for tokenizer in (whole.limit(rows), Tokenizer.load(tmp_path, vocab_size=rows)):
        assert tokenizer.vocab_size == rows
        last = f"<|reserved_token_{rows}|>"
        assert tokenizer.encode(last, parse_special=True) == peer_ids(last)
        assert tokenizer.decode(range(rows)) == whole.decode(range(rows))
        with pytest.raises(
            DataError, match=f"token id {rows} is outside the vocabulary of {rows}; it cannot be decoded"
        ):
            tokenizer.decode([rows])
    assert whole.limit(rows + 2) is whole
    with pytest.raises(DataError, match="10 of them ordinary ones behind the model's"):
        whole.limit(len(RANKS) - 10)
    with pytest.raises(DataError, match="10 of them ordinary ones behind the model's"):
        Tokenizer.load(tmp_path, vocab_size=len(RANKS) - 10)


def test_the_golden_ids_of_the_release(tmp_path: Path) -> None:
    """A made-up vocabulary of the released size, with the words of the golden prompt at their released ids."""
    words = {2482: b"user", 69702: b"assistant", 69211: b"Tell", 1019: b" me", 1215: b" about", 276: b" the"}
    words |= {64782: b" french", 25317: b" revolution"}
    # The release, too, starts with the bytes in the order of their alphabet, so that "." is 13.
    order = [bytes([byte]) for byte in byte_alphabet().values()]
    filled = order + [words.get(id, b"\xff" + id.to_bytes(3, "big")) for id in range(256, 163584)]
    tokenizer = Tokenizer.load(
        write_release(tmp_path, {token: id for id, token in enumerate(filled)}), vocab_size=163840
    )
    assert tokenizer.end_ids == (163585, 163586, 163593)
    assert tokenizer.vocab_size == 163840
    ids = ChatTemplate().apply([{"role": "user", "content": "Tell me about the french revolution."}], tokenizer)
    question = [69211, 1019, 1215, 276, 64782, 25317, 13]
    assert ids == [163587, 2482, 163601, *question, 163586, 163588, 69702, 163601]


def _lines(**changes: bytes) -> list[bytes]:
    lines = [base64.b64encode(token) + b" %d" % rank for token, rank in (BYTES | {b"ab": 256}).items()]
    return [changes.get(f"line{i}", line) for i, line in enumerate(lines)]


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (_lines(line3="é".encode() + b" 3"), "line 4: .* is not base64"),
        (_lines(line3=b"AB C= 3"), "line 4: .* is not base64"),
        (_lines(line3=b"AA=="), r"line 4: the rank is b''"),
        (_lines(line3=b"Aw== -3"), r"line 4: the rank is b'-3'"),
        (_lines(line3=b"Aw== " + b"9" * 10_000), "line 4: the rank is b'9999"),
        (_lines(line3=b" 3"), "line 4: the token has 0 bytes"),
        (_lines(line3=base64.b64encode(b"x" * 1025) + b" 3"), "line 4: the token has 1025 bytes, expected 1 to 1024"),
        (_lines(line3=b"AA== 3"), r"line 4: the token b'\\x00' stands there twice"),
        (_lines(line3=b"Aw== 4"), "257 tokens share 256 ranks"),
        (_lines(line3=b"Aw== 300"), "no token has rank 3, expected 0 to 256"),
        (_lines(line0=b"AA== 300"), "no token has rank 0, expected 0 to 256"),
        (_lines(line3=base64.b64encode(b"xy") + b" 3"), "1 of the 256 bytes are no token, the first 0x03"),
        ([], "256 of the 256 bytes are no token"),
        ([b"\x00" * ((16 << 20) - 1)], "has 16777217 bytes, expected at most 16777216"),
    ],
)
def test_a_damaged_file_is_one_sentence(tmp_path: Path, lines: list[bytes], sentence: str) -> None:
    file = tmp_path / "tiktoken.model"
    file.write_bytes(b"\r\n".join([*lines, b""]))
    with pytest.raises(DataError, match=sentence) as caught:
        tiktoken.read_ranks(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (None, "has no tokenizer_config.json"),
        ("{", "is not valid JSON"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder is a list"),
        ({"added_tokens_decoder": {"256": "x"}}, "added token '256' is 'x', expected an object with its content"),
        ({"added_tokens_decoder": {"256": {"content": ""}}}, "expected an object with its content"),
        ({"added_tokens_decoder": {"9": {"content": "x"}}}, "the id '9', expected one of 256 to 513"),
        ({"added_tokens_decoder": {"x": {"content": "x"}}}, "the id 'x', expected one of 256 to 513"),
        ({"added_tokens_decoder": {"256": {"content": "xx"}, "257": {"content": "xx"}}}, "'xx' has two ids"),
        ({"added_tokens_decoder": {"256": {"content": "x"}}}, "'x' is spelled like an ordinary token"),
        ({}, r"no special token '<\|endoftext\|>'; it has: <\|reserved_token_256\|>"),
        ({"eos_token": 7}, "eos_token is 7, expected a token's text"),
        ({"eos_token": "[EOS]"}, r"no special token '\[EOS\]'"),
    ],
)
def test_a_damaged_configuration_is_one_sentence(tmp_path: Path, config: object, sentence: str) -> None:
    write_release(tmp_path, BYTES)
    file = tmp_path / "tokenizer_config.json"
    file.unlink() if config is None else file.write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises((DataError, ConfigError), match=sentence):
        Tokenizer.load(tmp_path)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200), st.integers(0, 4000), st.booleans())
def test_random_damage_is_one_sentence_or_harmless(noise: bytes, place: int, insert: bool) -> None:
    whole = b"\n".join(_lines())
    end = place if insert else place + len(noise)
    file = Path("tiktoken.model")
    damaged = whole[:place] + noise + whole[end:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda self: damaged)
        patch.setattr(Path, "stat", lambda self, **_: type("S", (), {"st_size": len(damaged)}))
        sentence = ""
        try:
            ranks = tiktoken.read_ranks(file)
        except DataError as error:
            sentence = str(error)
    assert "\n" not in sentence
    assert sentence or set(BYTES) <= set(ranks)
