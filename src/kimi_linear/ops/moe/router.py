"""Routing in the obvious form, and the only one needed: E numbers a token.

    s = sigmoid(logits)  or  softmax(logits)                                                 (1)
    experts = the top_k largest of  s + bias                                                 (2)
    w = s[experts];  w <- w / (sum w + 1e-20);  w <- scaling * w                             (3)
    Kimi Linear 48B-A3B: sigmoid, top_k = 8, scaling = 2.446. The bias selects and never weighs.

Backward of (3) with r = scaling / (sum w + 1e-20), w' = scaling * w / (sum w + 1e-20):

    dw_j = r (dw'_j - sum_i dw'_i w'_i / scaling)   (renormalised),   dw_j = scaling dw'_j   (otherwise)  (4)
    dlogits = ds s (1 - s)  (sigmoid),  s (ds - sum ds s)  (softmax),  ds = dw at the chosen, 0 elsewhere (5)
"""

import torch
from torch import Tensor

from kimi_linear.ops.checks import compute_dtype
from kimi_linear.ops.moe.router_autograd import register

# Keeps 0 / 0 away when every chosen score underflows.
EPSILON = 1e-20


def _scores(logits: Tensor, activation: str) -> Tensor:
    """Eq. 1."""
    wide = logits.to(compute_dtype(logits))
    return wide.sigmoid() if activation == "sigmoid" else wide.softmax(-1)


@torch.library.custom_op("kimi_linear::moe_route_reference", mutates_args=())
def moe_route_reference(
    logits: Tensor, bias: Tensor, top_k: int, renormalize: bool, scaling: float, activation: str
) -> tuple[Tensor, Tensor]:
    """Equations 1 to 3; arguments as in `route`."""
    scores = _scores(logits, activation)
    # Eq. 2
    experts = (scores + bias).topk(top_k, dim=-1).indices
    weights = scores.gather(-1, experts)
    # Eq. 3
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + EPSILON)
    return weights * scaling, experts


@torch.library.custom_op("kimi_linear::moe_route_reference_backward", mutates_args=())
def moe_route_reference_backward(
    d_weights: Tensor, logits: Tensor, experts: Tensor, renormalize: bool, scaling: float, activation: str
) -> Tensor:
    """Equations 4 and 5."""
    scores = _scores(logits, activation)
    d_chosen = d_weights * scaling
    # Eq. 4
    if renormalize:
        chosen = scores.gather(-1, experts)
        total = chosen.sum(-1, keepdim=True) + EPSILON
        d_chosen = (d_chosen - (d_chosen * chosen).sum(-1, keepdim=True) / total) / total
    d_scores = torch.zeros_like(scores).scatter(-1, experts, d_chosen)
    # Eq. 5
    if activation == "sigmoid":
        d_logits = d_scores * scores * (1 - scores)
    else:
        d_logits = scores * (d_scores - (d_scores * scores).sum(-1, keepdim=True))
    return d_logits.to(logits.dtype)


register(moe_route_reference, moe_route_reference_backward)
