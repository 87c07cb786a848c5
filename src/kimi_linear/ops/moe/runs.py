"""What the backends share that sort the assignments (token, slot) by expert, so that an expert's rows are one run.

Everything here stays on the device of the experts: the host reads no count.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.ops.checks import compute_dtype
from kimi_linear.ops.moe.reference import silu_derivative


@dataclass(frozen=True)
class Runs:
    """Where each assignment goes when they are sorted by expert, ties in token order."""

    # [M * k]: row r of the sorted order is assignment order[r] = token * k + slot.
    order: Tensor
    # [E], int32: the row behind the last one of each expert.
    ends: Tensor


def sort_by_expert(experts: Tensor, E: int) -> Runs:
    """Sort assignments [M, k] by expert."""
    ordered, order = experts.flatten().sort(stable=True)
    # No bincount: on a GPU it waits for the greatest value.
    numbers = torch.arange(E, device=experts.device, dtype=experts.dtype)
    return Runs(order, torch.searchsorted(ordered, numbers, right=True, out_int32=True))


def inverse(order: Tensor) -> Tensor:
    """Return the sorted row of each assignment, [M * k]."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))


def combine(rows: Tensor, row: Tensor, weights: Tensor | None) -> Tensor:
    """Sum each token's rows [M * k, D], which are numbered in `row` [M, k], slot by slot: [M, D], in compute dtype."""
    M, k = row.shape
    total = rows.new_zeros(M, rows.shape[1], dtype=compute_dtype(rows))
    for j in range(k):
        picked = rows[row[:, j]]
        total += picked if weights is None else picked * weights[:, j, None].to(total.dtype)
    return total


def activation_gradients(
    gate: Tensor, up: Tensor, b: Tensor, c: Tensor, low: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return d_c and, in `low`, c a, dh1 and dh3 of equations 3 and 4, for rows of h1, h3 and b in compute dtype."""
    silu = F.silu(gate)
    a = silu * up
    # Eq. 3
    d_c = (b * a).sum(-1, keepdim=True)
    # Eq. 4
    d_a = c * b
    return d_c, (c * a).to(low), (d_a * up * silu_derivative(gate)).to(low), (d_a * silu).to(low)
