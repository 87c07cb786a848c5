import random

import pytest
import tokenizers

from kimi_linear.inference.text import IncrementalDecoder, StopStrings


class ByteTokenizer:
    """One token a byte, and a few tokens of several bytes, some of them cut inside a character."""

    pieces = (*(bytes([byte]) for byte in range(256)), b"the ", "é".encode(), "😀".encode()[:3], b"", b"\x80 ok")

    def decode(self, ids, /):
        return b"".join(self.pieces[token] for token in ids).decode("utf-8", errors="replace")


class PerByteTokenizer(ByteTokenizer):
    """Shows one mark for each unfinished byte, as byte-fallback decoders do."""

    def decode(self, ids, /):
        data = b"".join(self.pieces[token] for token in ids)
        return data.decode("utf-8", errors="surrogateescape").translate({0xDC80 + i: "\ufffd" for i in range(128)})


def pieces_of(tokenizer, ids):
    decoder = IncrementalDecoder(tokenizer)
    return [decoder.push(token) for token in ids] + [decoder.flush()]


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), PerByteTokenizer()])
@pytest.mark.parametrize("text", ["plain", "aé😀 — ü", "😀" * 40, "\ufffd a genuine mark \ufffd"])
def test_characters_come_out_whole(tokenizer, text):
    pieces = pieces_of(tokenizer, list(text.encode()))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


def test_the_pieces_of_any_bytes_join_to_the_whole_decoding():
    tokenizer = ByteTokenizer()
    draw = random.Random(0)
    for length in (1, 2, 15, 16, 17, 33, 200):
        for _ in range(40):
            ids = [draw.randrange(len(tokenizer.pieces)) for _ in range(length)]
            assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_tokenizer_of_the_usual_library_streams_its_own_text():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the cat sat on the mat, the cat sat"], trainer)
    text = "the cat sat — 猫が座った 😀😀 on the mat" * 3
    pieces = pieces_of(backend, backend.encode(text).ids)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_unfinished_bytes_come_out_as_a_mark_at_the_end():
    assert pieces_of(ByteTokenizer(), [97, *"😀".encode()[:2]]) == ["a", "", "", "\ufffd"]


def test_the_window_stays_short_on_long_text():
    longest = 0

    class Watching(ByteTokenizer):
        def decode(self, ids, /):
            nonlocal longest
            longest = max(longest, len(ids))
            return super().decode(ids)

    pieces_of(Watching(), list(b"text " * 200))
    assert longest <= 16


def let_through(stop, pieces):
    stops = StopStrings(stop)
    out = ""
    for piece in pieces:
        out += stops.push(piece)
        if stops.matched:
            return out, True
    return out + stops.flush(), False


@pytest.mark.parametrize(
    ("stop", "text", "expected"),
    [
        (("END",), "a END b", ("a ", True)),
        (("END",), "a EN", ("a EN", False)),
        (("END",), "EEND", ("E", True)),
        (("aab",), "aaab", ("a", True)),
        (("abcd", "b"), "abcd", ("a", True)),
        (("abc", "bc"), "xabc", ("x", True)),
        (("\n\n", "User:"), "hi\nUser: x", ("hi\n", True)),
        ((), "anything", ("anything", False)),
    ],
)
def test_stop_strings_end_the_text_however_it_is_cut(stop, text, expected):
    assert let_through(stop, [text]) == expected
    assert let_through(stop, list(text)) == expected
    for cut in range(1, len(text)):
        assert let_through(stop, [text[:cut], text[cut:]]) == expected


def test_text_that_cannot_begin_a_stop_string_is_not_held_back():
    stops = StopStrings(("END",))
    assert stops.push("say E") == "say "
    assert stops.push("x") == "Ex"
