"""Named cases that tests and benchmarks share. Letters as in api.py."""

from dataclasses import dataclass
from typing import Any

import torch

IGNORED = -100


@dataclass(frozen=True)
class CrossEntropySpec:
    """One call of `linear_cross_entropy`; each of the `ignored` rows carries the ignored label."""

    name: str
    M: int = 13
    D: int = 12
    V: int = 37
    chunk: int | None = 4
    reduction: str = "mean"
    ignored: tuple[int, ...] = ()
    # Standard deviation of the logits.
    spread: float = 2.0

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Return the keyword arguments of `linear_cross_entropy`, the same values for every dtype up to rounding."""
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(self.M, self.D, generator=generator, dtype=torch.float64)
        weight = torch.randn(self.V, self.D, generator=generator, dtype=torch.float64) * self.spread * self.D**-0.5
        labels = torch.randint(self.V, (self.M,), generator=generator)
        labels[list(self.ignored)] = IGNORED
        return {
            "hidden": hidden.to(device, dtype),
            "weight": weight.to(device, dtype),
            "labels": labels.to(device),
            "ignore_index": IGNORED,
            "chunk": self.chunk,
            "reduction": self.reduction,
        }


SPECS = (
    CrossEntropySpec("mean"),
    CrossEntropySpec("sum", reduction="sum"),
    CrossEntropySpec("none", reduction="none"),
    CrossEntropySpec("default_chunk", chunk=None),
    CrossEntropySpec("chunk_of_one", chunk=1, M=5),
    CrossEntropySpec("chunk_of_all", chunk=13),
    CrossEntropySpec("chunk_beyond_all", chunk=100),
    CrossEntropySpec("one_row", M=1),
    CrossEntropySpec("no_row", M=0),
    CrossEntropySpec("ignored", ignored=(0, 3, 4, 12)),
    CrossEntropySpec("ignored_none", ignored=(0, 3, 4, 12), reduction="none"),
    CrossEntropySpec("ignored_first_chunk", ignored=(0, 1, 2, 3), reduction="sum"),
    CrossEntropySpec("ignored_all", ignored=tuple(range(13))),
    CrossEntropySpec("ignored_all_none", ignored=tuple(range(13)), reduction="none"),
    CrossEntropySpec("one_word", V=1, M=3),
    CrossEntropySpec("many_words", M=70, D=67, V=531, chunk=None, ignored=(1, 2, 60)),
    CrossEntropySpec("many_words_in_chunks", M=70, D=67, V=531, chunk=32, reduction="none"),
    CrossEntropySpec("confident", spread=6.0),
)

# The head of a small model on a batch of 8192 tokens, for benchmarks alone.
BENCHMARK_SPECS = (CrossEntropySpec("M8192_V8192", M=8192, D=384, V=8192, chunk=None),)
