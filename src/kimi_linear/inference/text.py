"""Text from tokens as they arrive: whole characters only, and stop strings that may span tokens."""

from typing import Protocol

_REPLACEMENT = "\ufffd"
# An unfinished character has at most three bytes; decoders show one mark for them, or one for each.
_MOST_UNFINISHED = 3
# Tokens kept before the window of undecided text is cut down to its last one.
_WINDOW = 16


class TokenDecoder(Protocol):
    """What streaming needs of a tokenizer. `tokenizers.Tokenizer` is one."""

    def decode(self, ids: list[int], /) -> str:
        """Return the text of some tokens, bytes that are no character as U+FFFD."""
        ...


class IncrementalDecoder:
    """Turns tokens into text one at a time. The pieces, joined, are the decoding of all tokens at once.

    A piece never ends inside a character: bytes that may still become one wait for the next token. Holds for
    byte-level vocabularies, where the text of two tokens is the text of their bytes.

    Example:
        >>> class Latin:
        ...     def decode(self, ids, /):
        ...         return bytes(ids).decode("utf-8", errors="replace")
        >>> decoder = IncrementalDecoder(Latin())
        >>> [decoder.push(byte) for byte in "aé".encode()]
        ['a', '', 'é']
    """

    def __init__(self, tokenizer: TokenDecoder) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # Characters of the window's text that were handed out.
        self._emitted = 0

    def push(self, token_id: int) -> str:
        """Add a token; return the text that it completes, often "". Changes the window."""
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids)
        settled = len(text) - _unfinished(text)
        piece = text[self._emitted : settled]
        self._emitted = max(self._emitted, settled)
        if settled == len(text) and len(self._ids) >= _WINDOW:
            # The last token stays as context: some decoders treat the first token of a text differently.
            self._ids = self._ids[-1:]
            self._emitted = len(self._tokenizer.decode(self._ids))
        return piece

    def flush(self) -> str:
        """Return what still waits, unfinished bytes as U+FFFD. Nothing may be pushed afterwards."""
        text = self._tokenizer.decode(self._ids) if self._ids else ""
        piece = text[self._emitted :]
        self._emitted = len(text)
        return piece


def _unfinished(text: str) -> int:
    """Return how many characters at the end of the text may be bytes of an unfinished character."""
    marks = len(text) - len(text.rstrip(_REPLACEMENT))
    return min(marks, _MOST_UNFINISHED)


class StopStrings:
    """Lets text through up to the first stop string, holding back what may be the beginning of one.

    The stop string that is complete first wins, so the result does not depend on how the text was cut into pieces.

    Example:
        >>> stops = StopStrings(("END",))
        >>> [stops.push(piece) for piece in ("a E", "N", "D b")], stops.matched
        (['a ', '', ''], True)
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """Add text; return what is certainly before any stop string. Sets `matched` once one is complete."""
        text = self._held + text
        # (end, start) of the first match of each string; the smallest end is the first to be complete.
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self.matched, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return the text held back, which turned out to be no stop string. Empties it."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins, but does not complete, `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


class RowText:
    """The text of one row as its tokens arrive: whole characters, up to the first stop string.

    Without a tokenizer every piece is "".
    """

    def __init__(self, tokenizer: TokenDecoder | None, stop: tuple[str, ...]) -> None:
        self._decoder = None if tokenizer is None else IncrementalDecoder(tokenizer)
        self._stops = StopStrings(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete; no more text follows."""
        return self._stops.matched

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is now certain."""
        return "" if self._decoder is None else self._stops.push(self._decoder.push(token_id))

    def finish(self) -> str:
        """Return the text held back, now that no token follows; "" after a stop string."""
        if self._decoder is None or self.stopped:
            return ""
        text = self._stops.push(self._decoder.flush())
        return text if self.stopped else text + self._stops.flush()
