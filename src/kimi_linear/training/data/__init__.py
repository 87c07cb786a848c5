"""From text to batches: sources, tokenizer, token shards, packed batches, and compressors to compare with."""

from kimi_linear.text.tokenizer import Tokenizer
from kimi_linear.training.data.batches import PackedBatch, PackedBatches
from kimi_linear.training.data.compression import compressed_bits_per_byte
from kimi_linear.training.data.corpus import Split, load_addresses
from kimi_linear.training.data.prepare import prepare_shards
from kimi_linear.training.data.shards import TokenShards
from kimi_linear.training.data.sources import EmptySplitError, TextSource
from kimi_linear.training.data.validation import ValidationBatches

__all__ = [
    "EmptySplitError",
    "PackedBatch",
    "PackedBatches",
    "Split",
    "TextSource",
    "TokenShards",
    "Tokenizer",
    "ValidationBatches",
    "compressed_bits_per_byte",
    "load_addresses",
    "prepare_shards",
]
