"""A cache that transformers' `generate` accepts, around our own."""

from typing import Any

import transformers
from torch import Tensor

from kimi_linear.base.errors import StateError
from kimi_linear.nn.state import Cache


class KimiLinearCache(transformers.Cache):
    """What all layers remember of a batch: recurrent states of a fixed size, latents or keys of every token.

    It begins empty, takes its number of rows from the first call, and is continued from and updated in place by each
    call. `copy.deepcopy` makes an independent copy: of a long common prompt, say. Tokens cannot be taken back, since
    recurrent states do not know them one by one.

    Args:
        state: Our cache to continue from; default: before the first token.

    Example:
        >>> KimiLinearCache().get_seq_length()
        0
    """

    def __init__(self, state: Cache | None = None) -> None:
        super().__init__(layers=[])
        self.state = state
        # Columns of the batch so far, padding included, which is how `generate` counts.
        self._columns = 0 if state is None else int(state.lengths.max())

    def advance(self, columns: int) -> None:
        """Count the columns of a call that the state has seen."""
        self._columns += columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns of the batch seen so far, padding included."""
        return self._columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: there is no limit."""
        return -1

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state.layers)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} layers, {self.batch_size} rows, {self._columns} columns)"

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first call."""
        return -1 if self.state is None else self.state.batch_size

    @property
    def is_initialized(self) -> bool:
        """Whether a call has filled it."""
        return self.state is not None

    @property
    def is_croppable(self) -> bool:
        """False: recurrent states cannot be turned back."""
        return False

    def reset(self) -> None:
        """Forget everything, the number of rows included."""
        self.state, self._columns = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows of the given indices, in that order."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of the given indices, in that order, repeats allowed."""
        if self.state is not None:
            self.state = self.state.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row that many times, copies side by side."""
        if self.state is not None:
            self.state = self.state.select_rows(_row_numbers(self.state).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to take tokens back, other than none.

        Raises:
            StateError: There are some to remove.
        """
        if tokens_to_remove:
            raise StateError(
                f"a cache with recurrent states was asked to take back {abs(tokens_to_remove)} tokens, which "
                "it cannot; copy it (copy.deepcopy) before the tokens that may have to go."
            )

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse keys and values of transformers' own layers.

        Raises:
            StateError: Always.
        """
        raise StateError(
            "a KimiLinearCache was given to a model of transformers; use it with KimiLinearHybridForCausalLM."
        )


def _row_numbers(state: Cache) -> Tensor:
    return state.lengths.new_ones(state.batch_size).cumsum(0) - 1
