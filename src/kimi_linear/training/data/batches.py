"""Training batches: documents in a seeded order, concatenated with eos, cut into rows, packed into one sequence.

The stream of an epoch is every document once, shuffled, each as eos t_1 ... t_n eos: the eos before teaches how a
document begins (generation starts from it), the eos after how it ends. Without resets at documents one eos between two
documents does both. Epoch follows epoch without a seam, so no token is ever left out. Legend: B rows, T tokens a row,
L = B T tokens a batch, N packed sequences, U length of the epoch's stream.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kimi_linear.base.errors import ConfigError, DataError
from kimi_linear.training.data.shards import TokenShards


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Sequences laid end to end. The state of the model starts afresh, and no target is predicted, across a boundary.

    Labels equal inputs: the model shifts them by one inside each sequence. So the first token of a sequence is never
    a target, and the others are targets once.

    Args:
        input_ids: Tokens, int64 [1, L].
        cu_seqlens: Where sequences begin, int32 [N + 1], first 0, last L, increasing.
        num_bytes: Bytes of text that the targets spell; eos spells none.
    """

    input_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    num_bytes: int

    @property
    def labels(self) -> torch.Tensor:
        """Targets in the convention of transformers: aligned with `input_ids`, int64 [1, L]."""
        return self.input_ids

    @property
    def num_targets(self) -> int:
        """Number of tokens predicted: every token but the first of each sequence, L - N."""
        return self.input_ids.shape[1] - (self.cu_seqlens.shape[0] - 1)


def pack(tokens: NDArray[np.int64], boundaries: NDArray[np.int64], token_lengths: NDArray[np.int32]) -> PackedBatch:
    """Build a batch from its tokens [L] and the sorted positions where sequences begin, 0 and L included."""
    lengths = token_lengths[tokens]
    return PackedBatch(
        input_ids=torch.from_numpy(tokens)[None],
        cu_seqlens=torch.from_numpy(boundaries.astype(np.int32)),
        num_bytes=int(lengths.sum()) - int(lengths[boundaries[:-1]].sum()),
    )


def check_positive(least: int = 1, **values: int) -> None:
    """Raise ConfigError for the first named value that is below `least`."""
    for name, value in values.items():
        if value < least:
            raise ConfigError(f"{name} is {value}, expected {least} or more.")


class PackedBatches(Iterator[PackedBatch]):
    """An endless, seekable stream of training batches; the same arguments always give the same batches.

    Batch i of rank r holds the stream's tokens [(i * world_size + r) B T, ... + B T): ranks never share a token, and
    together they take the stream in order.

    Args:
        shards: The documents.
        seq_len: T, tokens a row, at least 2. Also the longest sequence, since every row starts afresh.
        batch_size: B, rows a batch on each rank.
        seed: Decides the order of documents, 0 to 2^32 - 1; every epoch has its own order.
        reset_documents: Begin a new sequence at each document too. If False only rows are sequences, and documents
            can see the end of the one before.
        rank: Which of `world_size` processes this is.
        world_size: How many processes share the stream.

    Raises:
        ConfigError: A size is too small, the seed too large, or rank is not below world_size.

    Cost: memory about 24 bytes a document for the order of the current epoch (twice that at its end); time is that
        of copying the tokens, plus some microseconds a document.

    Example:
        >>> import tempfile
        >>> from kimi_linear.training.data import TextSource, Tokenizer, prepare_shards
        >>> source = TextSource("sotu", split="validation")
        >>> shards = prepare_shards(tempfile.mkdtemp(), source, Tokenizer.train(source, vocab_size=512))
        >>> batches = PackedBatches(shards, seq_len=8, batch_size=2)
        >>> batch = next(batches)
        >>> batch.input_ids.shape, batch.cu_seqlens.tolist(), batch.num_targets
        (torch.Size([1, 16]), [0, 8, 16], 14)
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        seq_len: int,
        batch_size: int,
        seed: int = 0,
        reset_documents: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_positive(2, seq_len=seq_len)
        check_positive(batch_size=batch_size, world_size=world_size)
        if not 0 <= seed < 1 << 32:
            raise ConfigError(f"seed is {seed}, expected 0 to {(1 << 32) - 1}.")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank is {rank}, expected 0 to {world_size - 1} (world_size is {world_size}).")
        self._shards = shards
        self._seq_len = seq_len
        self._tokens = batch_size * seq_len
        self._seed = seed
        self._reset_documents = reset_documents
        self._rank = rank
        self._world_size = world_size
        self._position = 0
        # eos before each document, and after it too where the next one's cannot serve.
        self._unit_lengths = shards.document_tokens + (2 if reset_documents else 1)
        self.tokens_per_epoch = int(self._unit_lengths.sum())
        self._orders: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    @property
    def epoch(self) -> float:
        """Passes over the documents so far, all ranks together."""
        return self._position / self.tokens_per_epoch

    def __next__(self) -> PackedBatch:
        """Return the next batch of this rank and move on."""
        start = self._position + self._rank * self._tokens
        tokens, documents = self._read(start)
        rows = range(0, self._tokens + 1, self._seq_len)
        boundaries = np.unique(np.array([*rows, *(documents if self._reset_documents else [])], dtype=np.int64))
        self._position += self._world_size * self._tokens
        return pack(tokens, boundaries, self._shards.token_lengths)

    def state(self) -> dict[str, Any]:
        """Return where the stream is, for JSON; the same on every rank. Batch size and ranks may change on resuming."""
        epoch, position = divmod(self._position, self.tokens_per_epoch)
        return {"epoch": epoch, "position": position, **self._identity()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken; the next batch is the one that came next there.

        Raises:
            DataError: The state is malformed, or of other documents, another seed or other resets.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise DataError(f"the saved data position has {name} {state.get(name)!r}, this run has {value!r}.")
        match state:
            case {"epoch": int(epoch), "position": int(place)} if epoch >= 0 and 0 <= place < self.tokens_per_epoch:
                self._position = epoch * self.tokens_per_epoch + place
            case _:
                raise DataError(f"the saved data position {state} has no epoch and position of this stream.")

    def _identity(self) -> dict[str, Any]:
        return {
            "dataset": self._shards.manifest.fingerprint,
            "seed": self._seed,
            "reset_documents": self._reset_documents,
        }

    def _read(self, start: int) -> tuple[NDArray[np.int64], list[int]]:
        """Return one batch of the endless stream from a position, and where in it documents begin."""
        tokens = np.empty(self._tokens, dtype=np.int64)
        documents = []
        filled = 0
        while filled < self._tokens:
            epoch, offset = divmod(start + filled, self.tokens_per_epoch)
            order, ends = self._order(epoch)
            place = int(np.searchsorted(ends, offset, side="right"))
            document = int(order[place])
            begin = offset - (int(ends[place]) - int(self._unit_lengths[document]))
            if begin == 0:
                documents.append(filled)
            count = min(self._tokens - filled, int(ends[place]) - offset)
            tokens[filled : filled + count] = self._unit(document, begin, begin + count)
            filled += count
        return tokens, documents

    def _unit(self, document: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return a stretch of eos t_1 ... t_n (eos)."""
        unit = np.full(stop - start, self._shards.manifest.eos_id, dtype=np.int64)
        first = max(start, 1)
        text = self._shards.read(document, first - 1, stop - 1)
        unit[first - start : first - start + len(text)] = text
        return unit

    def _order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the documents of an epoch in order, and where each ends in the epoch's stream."""
        if epoch not in self._orders:
            # A batch may straddle two epochs; older ones are not needed.
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            # NumPy freezes the stream of this older generator, so an upgrade cannot reorder a resumed run.
            generator = np.random.RandomState(np.array([self._seed, epoch], dtype=np.uint32))
            order = generator.permutation(self._shards.num_documents)
            self._orders[epoch] = order, np.cumsum(self._unit_lengths[order])
        return self._orders[epoch]
