"""The routed experts, each on its own tokens only.

Assignments (token, slot) are sorted by expert once, so every expert sees one contiguous run of rows and runs three
matrix products on it. The results return by the inverse of the sort, slot by slot, so the order of the sum is fixed
and a token's result does not depend on its neighbours. Equations as numbered in reference.py.

Kept for the backward: h1 and h3, 2 * M * k * F elements of x's dtype; the products of the forward are not run again.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.ops.autocast import without_autocast
from kimi_linear.ops.checks import compute_dtype
from kimi_linear.ops.moe.checks import check_experts_values
from kimi_linear.ops.moe.experts_autograd import register
from kimi_linear.ops.moe.runs import activation_gradients, combine, inverse, sort_by_expert


@dataclass(frozen=True)
class Plan:
    """Where each assignment goes when they are sorted by expert."""

    # [M * k]: row r of the sorted order is assignment order[r] = token * k + slot.
    order: Tensor
    # [M * k]: the token of each sorted row.
    token: Tensor
    # [M, k]: the sorted row of each assignment.
    row: Tensor
    # (expert, its rows), experts without tokens left out.
    runs: list[tuple[int, slice]]


def plan_runs(experts: Tensor, E: int) -> Plan:
    """Sort assignments [M, k] by expert, ties in token order."""
    found = sort_by_expert(experts, E)
    ends: list[int] = found.ends.tolist()
    runs = [(e, slice(start, end)) for e, (start, end) in enumerate(pairwise([0, *ends])) if end > start]
    return Plan(found.order, found.order // experts.shape[1], inverse(found.order).view(experts.shape), runs)


@torch.library.custom_op("kimi_linear::grouped_mlp_grouped", mutates_args=())
def grouped_mlp_grouped(
    x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, weights: Tensor, experts: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (o, h1, h3); h1 and h3 [M * k, F] in sorted order, empty unless `keep`."""
    check_experts_values(experts, w1.shape[0])
    plan = plan_runs(experts, w1.shape[0])
    A, (_, width, _) = plan.order.numel(), w1.shape
    y = x.new_empty(A, x.shape[1])
    h1, h3 = (x.new_empty(A if keep else 0, width) for _ in range(2))
    wide = compute_dtype(x)
    with without_autocast(x.device):
        for e, run in plan.runs:
            tokens = x[plan.token[run]]
            gate, up = tokens @ w1[e].mT, tokens @ w3[e].mT
            if keep:
                h1[run], h3[run] = gate, up
            # Eq. 1
            a = (F.silu(gate.to(wide)) * up).to(x.dtype)
            y[run] = a @ w2[e].mT
    # Eq. 2
    return combine(y, plan.row, weights).to(x.dtype), h1, h3


@torch.library.custom_op("kimi_linear::grouped_mlp_grouped_backward", mutates_args=())
def grouped_mlp_grouped_backward(
    d_o: Tensor,
    x: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    weights: Tensor,
    experts: Tensor,
    h1: Tensor,
    h3: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Equations 3 to 5: gradients of x, w1, w3, w2 and weights."""
    plan = plan_runs(experts, w1.shape[0])
    wide, low = compute_dtype(x), x.dtype
    d_rows = x.new_empty(plan.order.numel(), x.shape[1])
    d_w1, d_w3, d_w2 = (torch.zeros_like(w, memory_format=torch.contiguous_format) for w in (w1, w3, w2))
    c = weights.flatten()[plan.order].to(wide)[:, None]
    d_c = torch.empty_like(c)
    with without_autocast(x.device):
        for e, run in plan.runs:
            tokens, grad = x[plan.token[run]], d_o[plan.token[run]]
            gate, up, b = h1[run].to(wide), h3[run].to(wide), (grad @ w2[e]).to(wide)
            d_c[run], weighed, d_h1, d_h3 = activation_gradients(gate, up, b, c[run], low)
            d_w2[e] = grad.mT @ weighed
            # Eq. 5
            d_w1[e], d_w3[e] = d_h1.mT @ tokens, d_h3.mT @ tokens
            d_rows[run] = torch.addmm(d_h3 @ w3[e], d_h1, w1[e])
    d_weights = d_c[plan.row, 0].to(weights.dtype)
    return combine(d_rows, plan.row, None).to(low), d_w1, d_w3, d_w2, d_weights


run = register(grouped_mlp_grouped, grouped_mlp_grouped_backward)
