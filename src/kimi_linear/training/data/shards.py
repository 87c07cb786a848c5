"""Token shards: documents as flat arrays on disk, mapped into memory, never read whole.

A directory holds

    manifest.json        what is here: version, fingerprint, tokenizer, dtype, counts; written last
    tokens-00000.bin     tokens of whole documents one after another, uint16 (vocabulary < 65536) or uint32
    offsets.bin          int64 [documents + 1]: where each document starts in the concatenation of all shards
    token_lengths.bin    int32 [vocab_size]: bytes of text each token spells, for bits per byte

all little-endian. No eos is stored; batches put it in. Legend: N documents.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kimi_linear.base.config import from_dict, read_json, to_dict
from kimi_linear.base.errors import ConfigError, DataError

MANIFEST = "manifest.json"
FORMAT = "kimi-linear-tokens"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a directory of shards holds. Counts are of all shards together; `shard_tokens` has one entry a shard."""

    fingerprint: str
    tokenizer: str
    dtype: str
    vocab_size: int
    eos_id: int
    num_documents: int
    num_tokens: int
    num_bytes: int
    shard_tokens: tuple[int, ...]
    shard_documents: tuple[int, ...]
    format: str = FORMAT
    version: int = VERSION

    def is_consistent(self) -> bool:
        """Return whether the counts are integers that add up and the dtype is one of ours."""
        counts = (self.vocab_size, self.num_documents, self.num_tokens, *self.shard_tokens, *self.shard_documents)
        return (
            all(isinstance(count, int) and count > 0 for count in counts)
            and self.dtype in ("<u2", "<u4")
            and sum(self.shard_tokens) == self.num_tokens
            and sum(self.shard_documents) == self.num_documents
            and len(self.shard_tokens) == len(self.shard_documents)
        )

    def file_sizes(self) -> dict[str, int]:
        """Return every file of the directory with the bytes it must have."""
        itemsize = np.dtype(self.dtype).itemsize
        sizes = {shard_name(i): tokens * itemsize for i, tokens in enumerate(self.shard_tokens)}
        return {**sizes, "offsets.bin": 8 * (self.num_documents + 1), "token_lengths.bin": 4 * self.vocab_size}

    def write(self, directory: Path) -> None:
        """Write `manifest.json` into a directory."""
        (directory / MANIFEST).write_text(json.dumps(to_dict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Read `manifest.json` of a directory, or raise DataError."""
        try:
            given: dict[str, Any] = read_json(directory / MANIFEST)
            if (given.get("format"), given.get("version")) != (FORMAT, VERSION):
                raise DataError(f"{directory} does not hold token shards of version {VERSION}; prepare the data again.")
            manifest = from_dict(cls, given, where=str(directory / MANIFEST))
        except ConfigError as error:
            raise DataError(f"{directory} does not hold token shards: {error} Prepare the data again.") from error
        if not manifest.is_consistent():
            raise DataError(
                f"{directory / MANIFEST} contradicts itself; it was edited or damaged: prepare the data again."
            )
        return manifest


def shard_name(index: int) -> str:
    """Return the file name of the shard with this index."""
    return f"tokens-{index:05d}.bin"


class TokenShards:
    """A tokenised set of documents on disk.

    Args:
        directory: As written by `prepare_shards`.

    Raises:
        DataError: There is no manifest, or a file is missing or has not the size the manifest says.

    Cost: reads the offsets (8 N bytes); tokens are mapped and read only when asked for.

    Example:
        >>> import tempfile
        >>> from kimi_linear.training.data import TextSource, Tokenizer, prepare_shards
        >>> directory, source = tempfile.mkdtemp(), TextSource("sotu", split="validation")
        >>> _ = prepare_shards(directory, source, Tokenizer.train(source, vocab_size=512))
        >>> shards = TokenShards(directory)
        >>> shards.num_documents, shards.num_bytes
        (18, 755332)
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.manifest = Manifest.read(self.directory)
        for name, size in self.manifest.file_sizes().items():
            _check_size(self.directory / name, size)
        self._shards = [
            np.memmap(self.directory / shard_name(i), dtype=self.manifest.dtype, mode="r")
            for i in range(len(self.manifest.shard_tokens))
        ]
        self._first_document = np.array([0, *accumulate(self.manifest.shard_documents)])
        self._first_token = [0, *accumulate(self.manifest.shard_tokens)]
        self._offsets = np.fromfile(self.directory / "offsets.bin", dtype="<i8")
        if self._offsets[0] != 0 or self._offsets[-1] != self.num_tokens or (np.diff(self._offsets) <= 0).any():
            raise DataError(f"{self.directory / 'offsets.bin'} is damaged; prepare the data again.")
        self.token_lengths: NDArray[np.int32] = np.fromfile(self.directory / "token_lengths.bin", dtype="<i4")

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return self.manifest.num_documents

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all documents, eos not counted."""
        return self.manifest.num_tokens

    @property
    def num_bytes(self) -> int:
        """Bytes of text (UTF-8) in all documents; equal to the sum of what the tokens spell."""
        return self.manifest.num_bytes

    @property
    def bytes_per_token(self) -> float:
        """Mean bytes of text a token spells. Bits per byte = bits per token / bytes per token."""
        return self.num_bytes / self.num_tokens

    @cached_property
    def document_tokens(self) -> NDArray[np.int64]:
        """Tokens in each document, int64 [N], all positive."""
        return np.diff(self._offsets)

    def read(self, document: int, start: int, stop: int) -> NDArray[Any]:
        """Return tokens start to stop of one document, a read-only view on the mapped file."""
        shard = int(np.searchsorted(self._first_document, document, side="right")) - 1
        begin = int(self._offsets[document]) - self._first_token[shard]
        stop = min(stop, int(self._offsets[document + 1] - self._offsets[document]))
        return self._shards[shard][begin + start : begin + stop]


def _check_size(file: Path, expected: int) -> None:
    try:
        size = file.stat().st_size
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); prepare the data again.") from error
    if size != expected:
        raise DataError(
            f"{file} has {size} bytes, expected {expected}: it is truncated or damaged; prepare the data again."
        )
