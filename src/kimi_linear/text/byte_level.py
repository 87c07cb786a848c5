"""The bytes of byte-level tokens.

A byte-level BPE writes each byte as one printable character: the 188 printable Latin-1 characters stand for
themselves, and the other 68 bytes take the characters from U+0100 up, in order of the byte. (Radford et al., Language
Models are Unsupervised Multitask Learners, 2019; the convention of every `ByteLevel` tokenizer.json since.)
"""

from functools import cache


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


def spell(token: bytes) -> str:
    """Return the characters that stand for some bytes.

    Example:
        >>> spell(b" a")
        'Ġa'
    """
    return token.decode("latin-1").translate(_characters())


@cache
def _characters() -> dict[int, str]:
    return {byte: character for character, byte in byte_alphabet().items()}
