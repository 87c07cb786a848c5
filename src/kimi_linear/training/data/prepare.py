"""Tokenise a source of documents into token shards, once: the same inputs again reuse what is there."""

import hashlib
import json
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from kimi_linear.base.errors import DataError
from kimi_linear.base.files import atomic_directory
from kimi_linear.base.writing import explain_write_errors
from kimi_linear.text.tokenizer import Tokenizer
from kimi_linear.training.data.shards import MANIFEST, VERSION, Manifest, TokenShards, shard_name
from kimi_linear.training.data.sources import TextSource

# 2^28 tokens: half a gigabyte a file with uint16.
SHARD_TOKENS = 1 << 28


def prepare_shards(
    directory: str | Path,
    source: TextSource,
    tokenizer: Tokenizer,
    *,
    shard_tokens: int = SHARD_TOKENS,
    progress: Callable[[int], object] | None = None,
) -> TokenShards:
    """Return the token shards of a source, writing them first unless the directory already holds the same.

    "The same" is decided by a fingerprint of the source's files and options, the tokenizer and the format. The
    directory appears whole or not at all; one that holds other or damaged shards is replaced once the new ones are
    complete.

    Args:
        directory: Where the shards are, or will be. If it exists it must be empty or hold token shards.
        source: The documents.
        tokenizer: What cuts them; it must spell every text exactly.
        shard_tokens: A new file starts when the current one holds this many tokens; documents stay whole.
        progress: Called with the bytes of text of each document once it is written.

    Raises:
        DataError: The source cannot be read or holds no text, the directory holds something else, the disk is full,
            or the tokenizer changes the text (then bits per byte would be wrong).

    Cost: about 3 MB of text a second on one core; memory 8 bytes a document plus the largest document's tokens.

    Example:
        >>> import tempfile
        >>> directory = Path(tempfile.mkdtemp())
        >>> text = directory / "hamlet.txt"
        >>> _ = text.write_text("to be or not to be")
        >>> tokenizer = Tokenizer.train(["to be"], vocab_size=257)
        >>> shards = prepare_shards(directory / "tokens", TextSource(str(text)), tokenizer)
        >>> shards.num_documents, shards.num_bytes, tokenizer.decode(shards.read(0, 0, 5))
        (1, 18, 'to be')
    """
    directory = Path(directory)
    fingerprint = _fingerprint(source, tokenizer)
    existing = _existing(directory, fingerprint)
    if existing is not None:
        return existing
    with explain_write_errors(directory), atomic_directory(directory) as temporary:
        manifest = _write(temporary, source, tokenizer, fingerprint, shard_tokens, progress)
        manifest.write(temporary)
    return TokenShards(directory)


def _fingerprint(source: TextSource, tokenizer: Tokenizer) -> str:
    described = json.dumps([VERSION, source.fingerprint(), tokenizer.fingerprint])
    return hashlib.sha256(described.encode()).hexdigest()


def _existing(directory: Path, fingerprint: str) -> TokenShards | None:
    """Return the shards in the directory if they are complete and the same; refuse a directory that is not ours."""
    if not directory.exists():
        return None
    if not (directory / MANIFEST).is_file():
        if not directory.is_dir() or any(directory.iterdir()):
            raise DataError(f"{directory} exists and does not hold token shards; choose another directory.")
        return None
    try:
        shards = TokenShards(directory)
    except DataError:
        # Damaged or of another version: it holds nothing that cannot be made again.
        return None
    return shards if shards.manifest.fingerprint == fingerprint else None


def _write(
    directory: Path,
    source: TextSource,
    tokenizer: Tokenizer,
    fingerprint: str,
    shard_tokens: int,
    progress: Callable[[int], object] | None,
) -> Manifest:
    dtype = "<u2" if tokenizer.vocab_size < 1 << 16 else "<u4"
    num_bytes = 0
    with _ShardWriter(directory, dtype, shard_tokens) as writer:
        for tokens, text_bytes in _tokens_and_bytes(source, tokenizer):
            writer.add(tokens)
            num_bytes += text_bytes
            if progress is not None:
                progress(text_bytes)
    # Not ndarray.tofile: its error on a full disk does not say that the disk is full.
    (directory / "offsets.bin").write_bytes(np.array(writer.offsets, dtype="<i8").tobytes())
    (directory / "token_lengths.bin").write_bytes(tokenizer.token_lengths.astype("<i4").tobytes())
    return Manifest(
        fingerprint=fingerprint,
        tokenizer=tokenizer.fingerprint,
        dtype=dtype,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        num_documents=len(writer.offsets) - 1,
        num_tokens=writer.offsets[-1],
        num_bytes=num_bytes,
        shard_tokens=tuple(writer.shard_tokens),
        shard_documents=tuple(writer.shard_documents),
    )


def _tokens_and_bytes(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[NDArray[np.uint32], int]]:
    """Yield each document's tokens and bytes of text, having checked that the tokens spell as many bytes."""
    sizes: deque[int] = deque()

    def measured() -> Iterator[str]:
        for document in documents:
            sizes.append(len(document.encode()))
            yield document

    for number, tokens in enumerate(tokenizer.encode_documents(measured()), start=1):
        size = sizes.popleft()
        spelled = int(tokenizer.token_lengths[tokens].sum())
        if spelled != size:
            raise DataError(
                f"document {number} has {size} bytes but its tokens spell {spelled}: the tokenizer changes the text; "
                "use a byte-level tokenizer without a normaliser."
            )
        yield tokens, size


class _ShardWriter:
    """Appends documents to token files, starting a new file when the current one is full."""

    def __init__(self, directory: Path, dtype: str, shard_tokens: int) -> None:
        self._directory = directory
        self._dtype = dtype
        self._limit = shard_tokens
        self._file: IO[bytes] | None = None
        self.offsets = array("q", [0])
        self.shard_tokens: list[int] = []
        self.shard_documents: list[int] = []

    def __enter__(self) -> "_ShardWriter":
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, tokens: NDArray[np.uint32]) -> None:
        """Append one document."""
        if self._file is None or self.shard_tokens[-1] >= self._limit:
            self._file = self._next_file()
        self._file.write(tokens.astype(self._dtype).tobytes())
        self.shard_tokens[-1] += len(tokens)
        self.shard_documents[-1] += 1
        self.offsets.append(self.offsets[-1] + len(tokens))

    def _next_file(self) -> IO[bytes]:
        if self._file is not None:
            self._file.close()
        self.shard_tokens.append(0)
        self.shard_documents.append(0)
        return (self._directory / shard_name(len(self.shard_tokens) - 1)).open("wb")
