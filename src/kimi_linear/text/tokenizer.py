"""Byte-level BPE tokenizer: trained on text or read from files, saved as `tokenizer.json`, exact for any Unicode text.

A thin class over the `tokenizers` library. A trained one cuts text by the GPT-2 pattern, which covers every character,
and the vocabulary holds all 256 bytes, so no text is lost and none is unknown. A special token such as `<|endoftext|>`
in a text is ordinary text unless the caller asks for it to be parsed.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from kimi_linear.base.errors import ConfigError, DataError
from kimi_linear.base.files import atomic_file
from kimi_linear.base.writing import explain_write_errors
from kimi_linear.text import tiktoken
from kimi_linear.text.byte_level import byte_alphabet
from kimi_linear.text.names import stated_end_ids, stated_names
from kimi_linear.text.unicode import check_unicode

END_OF_TEXT = "<|endoftext|>"
# What the released family ends a turn or a text with.
_RELEASED_ENDS = ("<|im_end|>", "[EOS]", "[EOT]")
_RELEASED_NAMES = {"bos_token": "[BOS]", "pad_token": "[PAD]", "unk_token": "[UNK]"}

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

    `special_ids` are the ids of the tokens flagged as special, by text; `control_ids` those of every token added to the
    vocabulary other than whitespace; `names` has the texts of `bos_token`, `eos_token`, `pad_token` and `unk_token`, as
    far as there are such; `is_released_kind` says whether text is cut as the released tokenizer does it.

    Args:
        backend: A tokenizer of the `tokenizers` library.
        eos: The special token that ends a document; in training it also begins one.
        names: Texts for `names`; the defaults are `[BOS]`, `[PAD]` and `[UNK]`.

    Raises:
        DataError: The vocabulary lacks a byte or the eos token.

    Example:
        >>> tokenizer = Tokenizer.train(["to be or not to be"], vocab_size=260)
        >>> tokenizer.decode(tokenizer.encode("not to be"))
        'not to be'
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, eos: str = END_OF_TEXT, *, names: Mapping[str, str] | None = None
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self.special_ids: dict[str, int] = {t.content: id for id, t in sorted(added.items()) if t.special}
        self.control_ids: dict[str, int] = {t.content: id for id, t in sorted(added.items()) if t.content.strip()}
        if eos not in self.special_ids:
            known = ", ".join(list(self.special_ids)[:20]) or "none"
            raise DataError(f"the tokenizer has no special token {eos!r}; it has: {known}. Name one of them as eos.")
        self.eos = eos
        self.eos_id: int = self.special_ids[eos]
        wanted = {**_RELEASED_NAMES, **(names or {}), "eos_token": eos}
        self.names = {name: token for name, token in wanted.items() if token in self.control_ids}
        self.is_released_kind = tiktoken.is_released_kind(backend)
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
    def load(cls, path: str | Path, *, eos: str | None = None, vocab_size: int | None = None) -> "Tokenizer":
        """Read a `tokenizer.json`, or the tokenizer of a directory: that file, or `tiktoken.model`.

        Args:
            path: The file or the directory.
            eos: The special token that ends a text; default: what the files beside say (`tokenizer_config.json`,
                `generation_config.json`, `config.json`), else `<|endoftext|>`.
            vocab_size: Rows of the model's embedding: `limit` to them.

        Raises:
            DataError: A file is missing, unreadable, not a tokenizer, not a byte-level BPE with that eos, or has
                ordinary tokens that the model has not.
            ConfigError: A file beside is not JSON.
        """
        file = _tokenizer_file(path)
        is_tiktoken = not file.exists() and (file.parent / tiktoken.RANKS_NAME).is_file()
        backend = tiktoken.read_tiktoken(file.parent, vocab_size) if is_tiktoken else _read_backend(file)
        names = stated_names(file.parent) if file.name == "tokenizer.json" else {}
        if eos is None:
            ends = stated_end_ids(file.parent) if file.name == "tokenizer.json" else []
            eos = names.get("eos_token") or _first_special(backend, ends) or END_OF_TEXT
        try:
            tokenizer = cls(backend, eos=eos, names=names)
            return tokenizer if vocab_size is None else tokenizer.limit(vocab_size)
        except DataError as error:
            raise DataError(f"{file.parent if is_tiktoken else file}: {error}") from error

    def limit(self, vocab_size: int) -> "Tokenizer":
        """Return a tokenizer without the ids that a model of `vocab_size` rows has no embedding for.

        The released tokenizer has two such ids, both control tokens: here they are text, and decoding them is refused.

        Raises:
            DataError: Ordinary tokens have such ids, so no text could be encoded safely.
        """
        if self.vocab_size <= vocab_size:
            return self
        described = json.loads(self._backend.to_str())
        vocabulary = described["model"]["vocab"]
        beyond = [token for token, id in vocabulary.items() if id >= vocab_size]
        if ordinary := [token for token in beyond if token not in self.special_ids]:
            raise DataError(
                f"the tokenizer has {self.vocab_size} tokens, {len(ordinary)} of them ordinary ones behind the "
                f"model's {vocab_size} rows; use the tokenizer that belongs to the model."
            )
        for token in beyond:
            del vocabulary[token]
        described["added_tokens"] = [token for token in described["added_tokens"] if token["id"] < vocab_size]
        return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(described)), self.eos, names=self.names)

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json`, whole or not at all; a path without the suffix .json is its directory.

        A directory without a `tokenizer_config.json` also gets one, which names eos, unless that is `<|endoftext|>`.

        Raises:
            DataError: It cannot be written (full disk, no permission); what was there before is untouched.
        """
        file = _tokenizer_file(path)
        with explain_write_errors(file), atomic_file(file) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")
        config = file.with_name(tiktoken.CONFIG_NAME)
        if file != Path(path) and self.eos != END_OF_TEXT and not config.exists():
            with explain_write_errors(config), atomic_file(config) as temporary:
                temporary.write_text(json.dumps({"eos_token": self.eos}, indent=2) + "\n", encoding="utf-8")

    def to_json(self) -> str:
        """Return the contents of `tokenizer.json`."""
        return self._backend.to_str(pretty=True)

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

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a text or a turn: eos, and those of `<|im_end|>`, `[EOS]` and `[EOT]` that there are."""
        ends = {self.special_ids[token] for token in _RELEASED_ENDS if token in self.special_ids}
        return tuple(sorted({self.eos_id, *ends}))

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """Ids to put before a text to continue: eos for a tokenizer laid out as `train` does it, else none."""
        is_ours = isinstance(self._backend.pre_tokenizer, pre_tokenizers.ByteLevel) and self.eos_id == 0
        return (self.eos_id,) if is_ours else ()

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Return the tokens of a text, with nothing added before or after.

        Args:
            text: Any text that UTF-8 can hold (no lone surrogates).
            parse_special: Read special tokens written in the text as such. Off by default: text from outside must not
                be able to end a document or forge a turn.

        Raises:
            DataError: The text holds a lone surrogate.
        """
        if not parse_special:
            return next(self.encode_documents([text])).tolist()
        check_unicode(text)
        pieces = tiktoken.pieces(text) if self.is_released_kind else [text]
        encodings = [self._parsing_backend.encode(piece, add_special_tokens=False) for piece in pieces]
        return list(chain.from_iterable(encoding.ids for encoding in encodings))

    def encode_plain(self, text: str) -> list[int]:
        """Return the tokens of a text in which no added token is read, not even one that is not flagged as special.

        Tokenizers flag marks such as `<tool_call>` as not special when they are part of a reply's text, and `encode`
        reads those as their own library does. For the released kind the two functions are the same.

        Raises:
            DataError: The text holds a lone surrogate.
        """
        return next(self._encode([text], self._plain_backend)).tolist()

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Return the tokens of each text, as `encode` would."""
        return [ids.tolist() for ids in self.encode_documents(texts)]

    def encode_documents(self, documents: Iterable[str]) -> Iterator[NDArray[np.uint32]]:
        """Yield the tokens of each document of a stream, in order, as uint32 [tokens].

        Small documents are encoded together and large ones in pieces, so memory stays near the largest document's
        tokens plus a few tens of MB, whatever the length of the stream.

        Cost: about 3 MB of text a second on one core.
        """
        # In the released tokenizer every added token is a control token, whatever its flag says.
        return self._encode(documents, self._plain_backend if self.is_released_kind else self._backend)

    def _encode(self, documents: Iterable[str], backend: tokenizers.Tokenizer) -> Iterator[NDArray[np.uint32]]:
        parts: list[NDArray[np.uint32]] = []
        for group in _groups(documents, tiktoken.pieces if self.is_released_kind else _pieces):
            # encode_batch_fast leaves out character offsets, which nobody here reads.
            encodings = backend.encode_batch_fast([piece for piece, _ in group], add_special_tokens=False)
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

    @cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        if self.control_ids.keys() <= self.special_ids.keys():
            return self._backend
        # The library reads an added token in every text unless it is flagged as special.
        plain = tokenizers.Tokenizer(self._backend.model)
        plain.normalizer, plain.pre_tokenizer = self._backend.normalizer, self._backend.pre_tokenizer
        plain.encode_special_tokens = True
        for _, token in sorted(self._backend.get_added_tokens_decoder().items()):
            token.special |= token.content in self.control_ids
            plain.add_tokens([token])
        return plain


def _tokenizer_file(path: str | Path) -> Path:
    return Path(path) if Path(path).suffix == ".json" else Path(path) / "tokenizer.json"


def _read_backend(file: Path) -> tokenizers.Tokenizer:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"{file} does not exist; give the path of a tokenizer.json or a tiktoken.model.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}.") from error
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # The library raises nothing narrower.
        raise DataError(f"{file} is not a tokenizer.json: {error}.") from error


def _first_special(backend: tokenizers.Tokenizer, ids: Iterable[int]) -> str | None:
    added = backend.get_added_tokens_decoder()
    return next((added[id].content for id in ids if id in added and added[id].special), None)


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


def _pieces(text: str) -> Iterator[str]:
    """Yield a text in pieces that encode to the same tokens as the whole; nothing for an empty text."""
    start = 0
    while start < len(text):
        cut = _SAFE_CUT.search(text, start + _PIECE_CHARACTERS)
        stop = cut.start() if cut else len(text)
        piece = text[start:stop]
        check_unicode(piece)
        yield piece
        start = stop


def _groups(documents: Iterable[str], cut: Callable[[str], Iterator[str]]) -> Iterator[list[tuple[str, bool]]]:
    """Yield lists of (piece, whether it ends its document), each list a bounded number of characters."""
    group: list[tuple[str, bool]] = []
    size = 0
    for document in documents:
        pieces = list(cut(document)) or [""]
        for i, piece in enumerate(pieces, start=1):
            group.append((piece, i == len(pieces)))
            size += len(piece)
            if size >= _GROUP_CHARACTERS or len(group) >= _GROUP_PIECES:
                yield group
                group, size = [], 0
    if group:
        yield group
