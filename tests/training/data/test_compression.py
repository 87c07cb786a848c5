import gzip
import lzma
import random

import pytest

from kimi_linear.base.errors import DataError
from kimi_linear.training.data import compressed_bits_per_byte, load_addresses


def test_held_out_text_compresses_as_english_does():
    text = "".join(address.text for address in load_addresses("validation")).encode()
    figures = compressed_bits_per_byte(text)
    assert list(figures) == ["gzip -9", "xz -9e"]
    assert 2.6 < figures["gzip -9"] < 2.75
    assert 2.15 < figures["xz -9e"] < 2.25


def test_figures_count_the_whole_output():
    text = b"to be or not to be, that is the question. " * 20
    figures = compressed_bits_per_byte(text)
    assert figures["gzip -9"] == 8 * len(gzip.compress(text, 9)) / len(text)
    assert figures["xz -9e"] == 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def test_noise_does_not_compress():
    assert all(bits > 8 for bits in compressed_bits_per_byte(random.Random(0).randbytes(10_000)).values())


def test_no_text_is_refused():
    with pytest.raises(DataError, match="there is no text to compress"):
        compressed_bits_per_byte(b"")
