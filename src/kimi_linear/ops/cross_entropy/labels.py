"""Which rows count, and the check that their labels name a row of the weight."""

import torch
from torch import Tensor

from kimi_linear.base.errors import ShapeError


def counted_rows(labels: Tensor, ignore_index: int, vocabulary: int) -> Tensor | None:
    """Return the indices of the rows that count, or None when all do. Waits for the device once.

    Raises:
        ShapeError: A label that is not `ignore_index` lies outside [0, vocabulary).
    """
    counted = labels != ignore_index
    outside = counted & ((labels < 0) | (labels >= vocabulary))
    # One read for both questions.
    is_outside, is_partial = torch.stack([outside.any(), ~counted.all()]).tolist()
    if is_outside:
        row = int(outside.nonzero()[0])
        raise ShapeError(
            f"linear_cross_entropy: labels holds {int(labels[row])} at row {row}, expected 0 to {vocabulary - 1} "
            f"(a row of weight) or ignore_index = {ignore_index}."
        )
    return counted.nonzero().squeeze(1) if is_partial else None
