"""Bytes of byte-level tokens, and text from a stream of tokens that never shows half a character.

A byte-level BPE writes each byte as one printable character: the 188 printable Latin-1 characters stand for
themselves, and the other 68 bytes take the characters from U+0100 up, in order of the byte. (Radford et al., Language
Models are Unsupervised Multitask Learners, 2019; the convention of every `ByteLevel` tokenizer.json since.)
"""

import codecs
from collections.abc import Sequence


def byte_alphabet() -> dict[str, int]:
    """Return the byte that each of the 256 characters of a byte-level vocabulary stands for.

    Example:
        >>> alphabet = byte_alphabet()
        >>> alphabet["a"], alphabet["Ġ"]
        (97, 32)
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return alphabet


class IncrementalDecoder:
    """Text of tokens that arrive one at a time; a character is returned once its last byte is there.

    The pieces returned by `push` and `finish` joined together equal decoding all tokens at once: bytes that cannot
    be UTF-8 become U+FFFD, as in `bytes.decode(errors="replace")`.

    Args:
        table: The bytes of every token, by id; empty for tokens that should show nothing.

    Example:
        >>> decoder = IncrementalDecoder([b"caf", bytes([0xC3]), bytes([0xA9])])
        >>> [decoder.push(0), decoder.push(1), decoder.push(2), decoder.finish()]
        ['caf', '', 'é', '']
    """

    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Take the next token and return the text that is now complete, often "" inside a character."""
        return self._decoder.decode(self._table[token])

    def finish(self) -> str:
        """Return U+FFFD if the tokens ended inside a character, else ""; the decoder is then as new."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
