"""Mixture of experts: which experts a token goes to, and those experts' gated MLPs.

Shape letters beside the usual: M tokens, k experts a token.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from kimi_linear.base.errors import ConfigError, ShapeError
from kimi_linear.ops.autocast import autocast_dtype, cast_inputs
from kimi_linear.ops.checks import (
    describe_call,
    expect_floating,
    expect_integer,
    expect_same_device,
    expect_same_dtype,
    expect_shape,
)
from kimi_linear.ops.moe import cpu, cpu_router, grouped, grouped_mm
from kimi_linear.ops.moe.reference import grouped_mlp_reference
from kimi_linear.ops.moe.router import EPSILON, moe_route_reference
from kimi_linear.ops.moe.triton import backend as triton
from kimi_linear.ops.native import refuse
from kimi_linear.ops.registry import Backend, Call, define
from kimi_linear.ops.triton.backend import untried

ACTIVATIONS = ("sigmoid", "softmax")


def _runs_all(call: Call) -> list[str]:
    return []


def _cast(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a backend that gets its tokens and matrices in the dtype of the active autocast."""

    def run_on_cast(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        return run(*cast_inputs(x, w1, w3, w2), weights, experts)

    return run_on_cast


ROUTE = define(
    "moe_route",
    Backend("cpu", cpu_router.run, refuse, "native: one pass over the logits; the lowest index first among equals"),
    Backend("reference", moe_route_reference, _runs_all, "scores, top-k, weights in float32"),
)
GROUPED_MLP = define(
    "grouped_mlp",
    Backend("cpu", cpu.run, refuse, "native: gather, activation and weighted sum inside the matrix products"),
    Backend("grouped_mm", _cast(grouped_mm.run), grouped_mm.refuse, "torch's grouped product, no count read", untried),
    Backend("triton", _cast(triton.run), triton.refuse, "grouped products on a GPU, no count read", untried),
    Backend("grouped", _cast(grouped.run), _runs_all, "tokens sorted by expert, three matrix products an expert"),
    Backend("reference", _cast(grouped_mlp_reference), _runs_all, "every expert runs every token"),
)


def route(
    logits: Tensor,
    bias: Tensor,
    *,
    top_k: int,
    renormalize: bool = True,
    scaling: float = 1.0,
    activation: str = "sigmoid",
    biased_combine: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose `top_k` experts a token and their weights.

        s = sigmoid(logits) or softmax(logits);   experts = top_k of s + bias
        w = s[experts];   w <- w / (sum w + 1e-20) if renormalize;   w <- scaling * w
        Kimi Linear 48B-A3B, arXiv:2510.26692; the bias is the auxiliary-loss-free one of arXiv:2408.15664, Eq. 3.

    Args:
        logits: Router logits, [M, E]; compute them in float32.
        bias: Selection bias, [E], float32. It selects and, without biased_combine, never weighs; it gets no gradient.
        top_k: Experts a token, 1 to E.
        renormalize: Whether the weights of a token sum to `scaling`.
        scaling: Multiplies the weights.
        activation: "sigmoid" or "softmax".
        biased_combine: Weigh by s + bias instead of s, as the code published with that checkpoint does by mistake.
        backend: "cpu", "reference", or None for the best that supports the call.

    Returns:
        weights [M, top_k], float32 (float64 for float64), differentiable in `logits` through the chosen scores; and
        experts [M, top_k], int64, in falling order of s + bias ("cpu": ties by rising index; else in any order).

    Raises:
        ShapeError, DtypeError, DeviceError: An argument disagrees with the others; names it.
        ConfigError: The activation is unknown.

    Numerics: everything in float32 (float64 for float64).
    Cost: a pass over [M, E] and a partial sort.

    Example:
        >>> import torch
        >>> weights, experts = route(torch.randn(5, 8), torch.zeros(8), top_k=2)
        >>> weights.sum(-1).allclose(torch.ones(5)), experts.shape
        (True, torch.Size([5, 2]))
    """
    expect_shape("route", "logits", logits, [None, None], "M, E")
    M, E = logits.shape
    expect_shape("route", "bias", bias, [E], "E")
    if not 1 <= top_k <= E:
        raise ShapeError(f"route: top_k is {top_k}, expected 1 to {E}, the number of experts.")
    if activation not in ACTIVATIONS:
        raise ConfigError(f"route: activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}.")
    expect_floating("route", logits=logits, bias=bias)
    expect_same_device("route", logits=logits, bias=bias)
    call = describe_call(logits, sizes={"M": M, "E": E, "k": top_k})
    run = ROUTE.choose(call, backend).run
    if not biased_combine:
        weights, experts = run(logits, bias.detach(), top_k, renormalize, float(scaling), activation)
        return weights, experts
    weights, experts = run(logits, bias.detach(), top_k, False, 1.0, activation)
    weights = weights + bias.detach().to(weights.dtype)[experts]
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + EPSILON)
    return weights * scaling, experts


def grouped_mlp(
    x: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    weights: Tensor,
    experts: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Run each token through its experts and add up what they say, weighted.

        o_m = sum_j weights[m, j] * w2_e (silu(w1_e x_m) * (w3_e x_m)),   e = experts[m, j]

    Args:
        x: Tokens, [M, D]. M may be 0.
        w1: Gate projections, [E, F, D].
        w3: Up projections, [E, F, D].
        w2: Down projections, [E, D, F].
        weights: Weight of each choice, [M, k], from `route`; float32 or the dtype of x.
        experts: The choices, [M, k], int64 or int32, in [0, E). An expert named twice by a token counts twice.
        backend: "cpu", "grouped_mm", "triton", "grouped", "reference", or None for the best that supports the call.

    Returns:
        [M, D] in the dtype of x (under autocast: in autocast's). A token's result does not depend on the other
        tokens ("cpu": bit for bit; else up to the rounding of matrix products of another height).

    Raises:
        ShapeError, DtypeError, DeviceError: An argument disagrees with the others; names it. An expert outside
            [0, E) is a ShapeError too, on the CPU; elsewhere only when KIMI_LINEAR_DEBUG is on.

    Numerics: matrix products in the dtype of x (under autocast: in autocast's), the gated activation and the weighted
        sum in float32 (float64 for float64), the sum in a fixed order: by slot, or by expert with "cpu". "triton" forms
        a product of float32 from three in tf32. Experts without tokens get gradients of exactly zero. Under autocast
        "cpu" reads tokens and matrices as they are, rounds what goes into a product, and returns gradients that are not
        rounded to autocast's dtype.
    Cost: 3 * M * k * D * F multiply-adds forward, twice that backward. All but "reference" keep 2 * M * k * F
        elements for the backward, and all but "cpu" and "reference" hold M * k * D for the experts' outputs. On a GPU
        "grouped" waits for the experts' counts; "grouped_mm" and "triton" never wait.

    Example:
        >>> import torch
        >>> x, w = torch.randn(5, 8), torch.randn(4, 6, 8)
        >>> weights, experts = route(torch.randn(5, 4), torch.zeros(4), top_k=2)
        >>> grouped_mlp(x, w, w, w.mT, weights, experts).shape
        torch.Size([5, 8])
    """
    op = "grouped_mlp"
    expect_shape(op, "x", x, [None, None], "M, D")
    M, D = x.shape
    expect_shape(op, "w1", w1, [None, None, D], "E, F, D")
    E, width = w1.shape[:2]
    expect_shape(op, "w3", w3, [E, width, D], "E, F, D")
    expect_shape(op, "w2", w2, [E, D, width], "E, D, F")
    expect_shape(op, "weights", weights, [M, None], "M, k")
    expect_shape(op, "experts", experts, [M, weights.shape[1]], "M, k")
    expect_floating(op, x=x, w1=w1, w3=w3, w2=w2, weights=weights)
    _expect_same_dtype(op, x=x, w1=w1, w3=w3, w2=w2)
    expect_integer(op, "experts", experts)
    expect_same_device(op, x=x, w1=w1, w3=w3, w2=w2, weights=weights, experts=experts)
    sizes = {"M": M, "D": D, "E": E, "F": width, "k": weights.shape[1]}
    call = describe_call(x, w1, w3, w2, weights, sizes=sizes)
    call = dataclasses.replace(call, dtype=str(autocast_dtype(x)).removeprefix("torch."))
    o: Tensor = GROUPED_MLP.choose(call, backend).run(x, w1, w3, w2, weights, experts.to(torch.int64))
    return o


def _expect_same_dtype(op: str, **tensors: Tensor) -> None:
    # What counts is the dtype after autocast; the casts themselves are for the message alone.
    if len({autocast_dtype(t) for t in tensors.values()}) > 1:
        expect_same_dtype(op, **dict(zip(tensors, cast_inputs(*tensors.values()), strict=True)))
