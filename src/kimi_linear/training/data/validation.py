"""Held-out text for bits per byte: fixed windows that predict every token of every document exactly once.

A document t_1 ... t_n is read as eos t_1 ... t_n, so its first token is predicted from eos alone. Window j holds
positions j (T - 1) to j (T - 1) + T - 1 of that, so neighbours share one token: the last target of one window is the
first input of the next, which is no target there. Every t_i is a target once, no eos ever is, and no context passes
between documents or windows. Hence, with nll in nats summed over all targets,

    bits per byte = nll / ln 2 / num_bytes

where num_bytes is the UTF-8 length of the held-out text: exactly the bytes the targets spell. A window sees at most
T - 1 tokens of context, so the figure is not better than that of the same model reading documents whole.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kimi_linear.training.data.batches import PackedBatch, check_positive, pack
from kimi_linear.training.data.shards import TokenShards


class ValidationBatches:
    """The windows of a set of documents, in order, some to a batch; iterate as often as needed.

    Args:
        shards: The held-out documents.
        seq_len: T, longest window, at least 2.
        batch_size: Windows a batch; the last may hold fewer, and a document's last window may be shorter than T.
        every: Keep one batch in this many, evenly spread, for a quick look during training. The figure over a subset
            is honest for the subset; only every=1 is the whole held-out text.

    Raises:
        ConfigError: A size is too small.

    Example:
        >>> import tempfile
        >>> from kimi_linear.training.data import TextSource, Tokenizer, prepare_shards
        >>> source = TextSource("sotu", split="validation")
        >>> shards = prepare_shards(tempfile.mkdtemp(), source, Tokenizer.train(source, vocab_size=512))
        >>> batches = ValidationBatches(shards, seq_len=512, batch_size=8)
        >>> sum(batch.num_bytes for batch in batches) == shards.num_bytes
        True
    """

    def __init__(self, shards: TokenShards, *, seq_len: int, batch_size: int, every: int = 1) -> None:
        check_positive(2, seq_len=seq_len)
        check_positive(batch_size=batch_size, every=every)
        self._shards = shards
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._every = every
        # n targets, T - 1 a window.
        windows = -(-shards.document_tokens // (seq_len - 1))
        self._ends = np.cumsum(windows)

    def __len__(self) -> int:
        return len(self._starts())

    def __iter__(self) -> Iterator[PackedBatch]:
        for start in self._starts():
            stop = min(start + self._batch_size, int(self._ends[-1]))
            windows = [self._window(window) for window in range(start, stop)]
            boundaries = np.cumsum([0, *map(len, windows)])
            yield pack(np.concatenate(windows), boundaries, self._shards.token_lengths)

    def _starts(self) -> range:
        return range(0, int(self._ends[-1]), self._batch_size * self._every)

    def _window(self, window: int) -> NDArray[np.int64]:
        document = int(np.searchsorted(self._ends, window, side="right"))
        first_window = int(self._ends[document - 1]) if document else 0
        # In the document, its first target; the input before it is eos or the token before.
        start = (window - first_window) * (self._seq_len - 1)
        if start > 0:
            return self._shards.read(document, start - 1, start + self._seq_len - 1).astype(np.int64)
        text = self._shards.read(document, 0, self._seq_len - 1)
        return np.concatenate([[self._shards.manifest.eos_id], text]).astype(np.int64)
