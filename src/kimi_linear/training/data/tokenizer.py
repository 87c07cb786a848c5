"""Byte-level BPE tokenizer: trained on text, saved as the usual `tokenizer.json`, exact for any Unicode text.

A thin class over the `tokenizers` library. Text is cut by the GPT-2 pattern, which covers every character, and the
vocabulary holds all 256 bytes, so no text is lost and none is unknown. A special token such as `<|endoftext|>` in a
text is ordinary text unless the caller asks for it to be parsed.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from kimi_linear.base.errors import ConfigError, DataError
from kimi_linear.base.files import atomic_file
from kimi_linear.training.data.byte_level import byte_alphabet
from kimi_linear.training.data.writing import explain_write_errors

END_OF_TEXT = "<|endoftext|>"

# The library's thread pool does not survive a fork: a child hangs or prints a warning, and torch.compile forks. Setting
# the variable to "true" encodes faster on many cores (1.6 times on two); a user's own setting stands.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A long text is encoded in pieces, since the library needs some hundred bytes of memory a token. Between a letter or
# digit and a single space or newline before another, the usual patterns always cut, so pieces change no token.
_SAFE_CUT = re.compile(r"(?<=[^\W_])(?=[ \n][^\W_])")
_PIECE_CHARACTERS = 1 << 17
_GROUP_CHARACTERS = 1 << 20
_GROUP_PIECES = 1 << 12


class Tokenizer:
    """A byte-level BPE tokenizer.

    Args:
        backend: A tokenizer of the `tokenizers` library.
        eos: The special token that ends, and here also begins, a document.

    Raises:
        DataError: The vocabulary lacks a byte or the eos token.

    Example:
        >>> tokenizer = Tokenizer.train(["to be or not to be"], vocab_size=260)
        >>> tokenizer.decode(tokenizer.encode("not to be"))
        'not to be'
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos: str = END_OF_TEXT) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self.special_ids: dict[str, int] = {t.content: id for id, t in sorted(added.items()) if t.special}
        if eos not in self.special_ids:
            known = ", ".join(self.special_ids) or "none"
            raise DataError(f"the tokenizer has no special token {eos!r}; it has: {known}. Name one of them as eos.")
        self.eos = eos
        self.eos_id: int = self.special_ids[eos]
        self._bytes = _bytes_of_tokens(backend)

    @classmethod
    def train(
        cls, documents: Iterable[str], *, vocab_size: int, special_tokens: Sequence[str] = (END_OF_TEXT,)
    ) -> "Tokenizer":
        """Learn a vocabulary from documents. The same documents in the same order give the same tokenizer.

        Args:
            documents: Texts; read once, in order.
            vocab_size: Tokens wanted, special tokens and the 256 bytes included. Little text may give fewer.
            special_tokens: They take the ids from 0 up; the first is eos.

        Raises:
            ConfigError: `vocab_size` leaves no room for the 256 bytes, or there is no special token.
            DataError: The documents hold no text.

        Cost: about 2 s for 10 MB of English and 4096 tokens on one core.
        """
        smallest = 256 + len(special_tokens)
        if vocab_size < smallest:
            raise ConfigError(f"vocab_size is {vocab_size}, expected at least {smallest} (256 bytes + special tokens).")
        if not special_tokens or len(set(special_tokens)) != len(special_tokens):
            raise ConfigError(f"special_tokens is {list(special_tokens)}, expected one or more different tokens.")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(special_tokens),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        pieces = chain.from_iterable(map(_pieces, documents))
        first = next(pieces, None)
        if first is None:
            raise DataError("there is no text to train a tokenizer on; give documents that are not empty.")
        backend.train_from_iterator(chain([first], pieces), trainer)
        return cls(backend, eos=special_tokens[0])

    @classmethod
    def load(cls, path: str | Path, *, eos: str = END_OF_TEXT) -> "Tokenizer":
        """Read a `tokenizer.json`, or the one in a directory.

        Raises:
            DataError: The file is missing, unreadable, not a tokenizer, or not a byte-level BPE with that eos.
        """
        file = _tokenizer_file(path)
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise DataError(f"{file} does not exist; give the path of a tokenizer.json.") from error
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read: {error}.") from error
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # The library raises nothing narrower.
            raise DataError(f"{file} is not a tokenizer.json: {error}.") from error
        try:
            return cls(backend, eos=eos)
        except DataError as error:
            raise DataError(f"{file}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json`, whole or not at all; a path without the suffix .json is its directory.

        Raises:
            DataError: It cannot be written (full disk, no permission); what was there before is untouched.
        """
        file = _tokenizer_file(path)
        with explain_write_errors(file), atomic_file(file) as temporary:
            temporary.write_text(self._backend.to_str(pretty=True), encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Rows an embedding needs: the largest id plus one."""
        return len(self._bytes)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides how a text is cut, in hexadecimal."""
        return hashlib.sha256(f"{self.eos}\n{self._backend.to_str()}".encode()).hexdigest()

    @cached_property
    def token_lengths(self) -> NDArray[np.int32]:
        """Bytes of text each token spells, [vocab_size]; 0 for special tokens, which spell nothing."""
        lengths = np.array([len(spelled) for spelled in self._bytes], dtype=np.int32)
        lengths[list(self.special_ids.values())] = 0
        return lengths

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Return the tokens of a text, with nothing added before or after.

        Args:
            text: Any text that UTF-8 can hold (no lone surrogates).
            parse_special: Read special tokens written in the text as such. Off by default: text from outside must not
                be able to end a document or forge a turn.

        Raises:
            DataError: The text holds a lone surrogate.
        """
        if parse_special:
            _check_unicode(text)
            return list(self._parsing_backend.encode(text, add_special_tokens=False).ids)
        return next(self.encode_documents([text])).tolist()

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Return the tokens of each text, as `encode` would."""
        return [ids.tolist() for ids in self.encode_documents(texts)]

    def encode_documents(self, documents: Iterable[str]) -> Iterator[NDArray[np.uint32]]:
        """Yield the tokens of each document of a stream, in order, as uint32 [tokens].

        Small documents are encoded together and large ones in pieces, so memory stays near the largest document's
        tokens plus a few tens of MB, whatever the length of the stream.

        Cost: about 3 MB of text a second on one core.
        """
        parts: list[NDArray[np.uint32]] = []
        for group in _groups(documents):
            # encode_batch_fast leaves out character offsets, which nobody here reads.
            encodings = self._backend.encode_batch_fast([piece for piece, _ in group], add_special_tokens=False)
            for encoding, (_, is_last) in zip(encodings, group, strict=True):
                parts.append(np.array(encoding.ids, dtype=np.uint32))
                if is_last:
                    yield np.concatenate(parts)
                    parts = []

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Return the text of tokens; the exact inverse of `encode`.

        A prefix of an encoded text may end inside a character, which then shows as U+FFFD.

        Raises:
            DataError: An id is not in the vocabulary.
        """
        table = self._table(skip_special)
        spelled = bytearray()
        for id in map(int, ids):
            if not 0 <= id < len(table):
                raise DataError(f"token id {id} is outside the vocabulary of {self.vocab_size}; it cannot be decoded.")
            spelled += table[id]
        return spelled.decode("utf-8", errors="replace")

    def _table(self, skip_special: bool) -> list[bytes]:
        return self._bytes_without_special if skip_special else self._bytes

    @cached_property
    def _bytes_without_special(self) -> list[bytes]:
        special = set(self.special_ids.values())
        return [b"" if id in special else spelled for id, spelled in enumerate(self._bytes)]

    @cached_property
    def _parsing_backend(self) -> tokenizers.Tokenizer:
        # A second instance: the setting belongs to the backend, and changing it back and forth is not thread-safe.
        return tokenizers.Tokenizer.from_str(self._backend.to_str())


def _tokenizer_file(path: str | Path) -> Path:
    return Path(path) if Path(path).suffix == ".json" else Path(path) / "tokenizer.json"


def _bytes_of_tokens(backend: tokenizers.Tokenizer) -> list[bytes]:
    """Return what each token spells, by id; an id nothing uses spells nothing."""
    alphabet = byte_alphabet()
    added = {id: token.content for id, token in backend.get_added_tokens_decoder().items()}
    vocabulary = backend.get_vocab()
    if missing := [character for character in alphabet if character not in vocabulary]:
        raise DataError(f"the tokenizer is not a byte-level BPE: {len(missing)} of the 256 bytes are no token of it.")
    table = [b""] * (max(vocabulary.values()) + 1)
    for token, id in vocabulary.items():
        try:
            table[id] = added[id].encode() if id in added else bytes(alphabet[character] for character in token)
        except KeyError as error:
            raise DataError(f"the tokenizer is not a byte-level BPE: token {token!r} does not spell bytes.") from error
    return table


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text holds a lone surrogate (U+{ord(text[error.start]):04X}), which is no character; remove it."
        ) from error


def _pieces(text: str) -> Iterator[str]:
    """Yield a text in pieces that encode to the same tokens as the whole; nothing for an empty text."""
    start = 0
    while start < len(text):
        cut = _SAFE_CUT.search(text, start + _PIECE_CHARACTERS)
        stop = cut.start() if cut else len(text)
        piece = text[start:stop]
        _check_unicode(piece)
        yield piece
        start = stop


def _groups(documents: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
    """Yield lists of (piece, whether it ends its document), each list a bounded number of characters."""
    group: list[tuple[str, bool]] = []
    size = 0
    for document in documents:
        pieces = list(_pieces(document)) or [""]
        for i, piece in enumerate(pieces, start=1):
            group.append((piece, i == len(pieces)))
            size += len(piece)
            if size >= _GROUP_CHARACTERS or len(group) >= _GROUP_PIECES:
                yield group
                group, size = [], 0
    if group:
        yield group
