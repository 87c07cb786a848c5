"""One token a sequence through a Kimi Delta Attention layer, from its projections to its gated norm, in place."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kimi_linear.base.errors import ConfigError, DtypeError
from kimi_linear.ops.checks import (
    describe_call,
    expect_floating,
    expect_integer,
    expect_same_device,
    expect_shape,
)
from kimi_linear.ops.conv.api import SHORT_CONV_DECODE
from kimi_linear.ops.delta_rule.core import KDA_CORE_DECODE, check_core
from kimi_linear.ops.delta_rule.decode import refuse_gradients
from kimi_linear.ops.delta_rule.layout import wide_dtype
from kimi_linear.ops.delta_rule.triton import layer_backend
from kimi_linear.ops.norm.api import GATED_RMS_NORM
from kimi_linear.ops.registry import Backend, Op, define
from kimi_linear.ops.triton.backend import untried


class KDAWeights(NamedTuple):
    """What a Kimi Delta Attention layer learns between its projections.

    Args:
        conv_q, conv_k: Taps, [H K, W] or [H K, 1, W].
        conv_v: Taps, [HV V, W] or [HV V, 1, W].
        A_log: Log of the decay's rate, [HV], or None (bounded gate only).
        dt_bias: Added to the forget gate's logits, [HV K], or None.
        norm: Weight of the output norm, [V].
    """

    conv_q: Tensor
    conv_k: Tensor
    conv_v: Tensor
    A_log: Tensor | None
    dt_bias: Tensor | None
    norm: Tensor


class KDAPools(NamedTuple):
    """What Kimi Delta Attention layers remember, S slots each.

    Args:
        conv_q, conv_k: Last inputs of the convolutions, oldest first, [S, H K, W - 1].
        conv_v: The same of the values, [S, HV V, W - 1].
        recurrent: States, [S, HV, K, V], float32 (float64 beside float64 inputs), or bfloat16.
    """

    conv_q: Tensor
    conv_k: Tensor
    conv_v: Tensor
    recurrent: Tensor


# Fields of both; D is H K or HV V.
_CONVOLUTIONS = ("conv_q", "conv_k", "conv_v")


def _composition(backend: str | None) -> Callable[..., Tensor]:
    """Return the operators one after the other, each on the named backend, or None: each on its own best."""

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor,
        beta: Tensor,
        output_gate: Tensor,
        weights: KDAWeights,
        pools: KDAPools,
        slots: Tensor,
        lower_bound: float | None,
        beta_scale: float,
        scale: float,
        eps: float,
        silu: bool,
    ) -> Tensor:
        (N, H, K), (HV, V) = q.shape, v.shape[1:]
        sizes = {"N": N, "H": H, "HV": HV, "K": K, "V": V, "W": weights.conv_q.shape[-1], "M": N * HV}

        def chosen(op: Op, x: Tensor) -> Callable[..., Tensor]:
            # The arguments are checked, and none needs a gradient.
            return op.choose(describe_call(x, sizes=sizes), backend).run

        def convolve(x: Tensor, taps: Tensor, pool: Tensor) -> Tensor:
            step = chosen(SHORT_CONV_DECODE, x)
            return step(x.flatten(1), taps.flatten(1), pool, slots, True).view(x.shape)

        q = convolve(q, weights.conv_q, pools.conv_q)
        k = convolve(k, weights.conv_k, pools.conv_k)
        v = convolve(v, weights.conv_v, pools.conv_v)
        inputs = (q, k, v, gate, beta, weights.A_log, weights.dt_bias)
        o = chosen(KDA_CORE_DECODE, q)(*inputs, pools.recurrent, slots, lower_bound, beta_scale, scale)
        return chosen(GATED_RMS_NORM, o)(o, output_gate, weights.norm, eps, silu)

    return run


KDA_LAYER_DECODE = define(
    "kda_layer_decode",
    Backend("triton", layer_backend.run, layer_backend.refuse, "one launch on a GPU, in place", untried),
    Backend("plain", _composition(None), refuse_gradients, "one operator after the other, each on its best backend"),
    Backend("reference", _composition("reference"), refuse_gradients, "the references, one after the other"),
)


def kda_layer_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    beta: Tensor,
    output_gate: Tensor,
    weights: KDAWeights,
    pools: KDAPools,
    slots: Tensor,
    *,
    eps: float,
    activation: Literal["sigmoid", "silu"] = "sigmoid",
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Run what a Kimi Delta Attention layer does between its projections for one token a sequence, in place.

        q, k, v <- short_conv_decode(q), short_conv_decode(k), short_conv_decode(v)
        o       =  kda_core_decode(q, k, v, gate, beta)
        y       =  gated_rms_norm(o, output_gate)
        Kimi Linear, arXiv:2510.26692, §4.

    Args:
        q: Projected queries, [N, H, K].
        k: Projected keys, [N, H, K].
        v: Projected values, [N, HV, V]; HV must be a multiple of H.
        gate: Logits of the forget gate, [N, HV, K].
        beta: Logits of the write strength, [N, HV].
        output_gate: Logits of the output gate, [N, HV, V].
        weights: The layer's filters, decay parameters and norm; see `KDAWeights`.
        pools: Histories and states, all of S slots; see `KDAPools`. The rows named by `slots` are overwritten, all
            others stay bit-identical.
        slots: Row of the pools of each sequence, [N], int32 or int64, no row twice; -1: skip, its output is zero.
        eps: Of the output norm, added to the mean square.
        activation: "sigmoid" or "silu", of the output gate.
        lower_bound, allow_neg_eigval, scale: As for `kda_core`.
        backend: "triton", "plain", "reference", or None.

    Returns:
        y [N, HV, V] in the dtype of v, what the layer's output projection takes.

    Raises:
        ShapeError, DtypeError, DeviceError: An argument disagrees; names it, what it is and what it should be.
        ConfigError: Unknown activation, or as for `kda_core`.
        BackendError: The named backend cannot run this call, or a gradient is needed: an update in place has none.

    Numerics: rounds where the three operators round: the convolved q, k and v to their own dtypes, o to that of v;
        float32 between (float64 for float64 inputs). A bfloat16 state is rounded once a token.
    Cost: reads and writes every named state and history once. "triton" starts one program a sequence and key head,
        because the heads of a group share the histories of q and k: at N H below the number of multiprocessors some
        of these idle.

    Example:
        >>> import torch
        >>> q, k, v, gate, output_gate = torch.randn(5, 2, 1, 8)
        >>> weights = KDAWeights(*torch.randn(3, 8, 4), torch.zeros(1), torch.zeros(8), torch.ones(8))
        >>> pools = KDAPools(*torch.zeros(3, 6, 8, 3), torch.zeros(6, 1, 8, 8))
        >>> slots = torch.tensor([5, 0])
        >>> kda_layer_decode(q, k, v, gate, torch.randn(2, 1), output_gate, weights, pools, slots, eps=1e-5).shape
        torch.Size([2, 1, 8])
    """
    op = "kda_layer_decode"
    check_core(op, q, k, v, gate, beta, weights.A_log, weights.dt_bias, lower_bound, "N")
    _check_rest(op, q, v, output_gate, weights, pools, slots)
    if activation not in ("sigmoid", "silu"):
        raise ConfigError(f"{op}: activation is {activation!r}, expected 'sigmoid' or 'silu'.")
    (N, H, K), (HV, V), W = q.shape, v.shape[1:], weights.conv_q.shape[-1]
    sizes = {"N": N, "H": H, "HV": HV, "K": K, "V": V, "W": W}
    call = describe_call(q, k, v, gate, beta, output_gate, *weights, *pools, sizes=sizes)
    run = KDA_LAYER_DECODE.choose(call, backend).run
    scale = K**-0.5 if scale is None else float(scale)
    numbers = (lower_bound, 2.0 if allow_neg_eigval else 1.0, scale, eps, activation == "silu")
    y: Tensor = run(q, k, v, gate, beta, output_gate, weights, pools, slots, *numbers)
    return y


def _check_rest(
    op: str, q: Tensor, v: Tensor, output_gate: Tensor, weights: KDAWeights, pools: KDAPools, slots: Tensor
) -> None:
    """Raise the error for the first argument, other than those of `kda_core`, that disagrees."""
    (N, H, K), (HV, V), S = q.shape, v.shape[1:], pools.recurrent.shape[0]
    expect_floating(op, output_gate=output_gate, **weights._asdict())
    expect_floating(op, **pools._asdict())
    expect_shape(op, "output_gate", output_gate, v.shape, "N, HV, V")
    expect_shape(op, "weights.norm", weights.norm, (V,), "V")
    W = weights.conv_q.shape[-1]
    for name, taps, pool, D in zip(_CONVOLUTIONS, weights[:3], pools[:3], (H * K, H * K, HV * V), strict=True):
        assert taps is not None
        expect_shape(op, f"weights.{name}", taps, (D, W) if taps.dim() == 2 else (D, 1, W), "D, W or D, 1, W")
        expect_shape(op, f"pools.{name}", pool, (S, D, W - 1), "S, D, W - 1")
    expect_shape(op, "pools.recurrent", pools.recurrent, (S, HV, K, V), "S, HV, K, V")
    expect_shape(op, "slots", slots, (N,), "N")
    expect_integer(op, "slots", slots)
    expect_same_device(op, q=q, output_gate=output_gate, **weights._asdict())
    expect_same_device(op, q=q, slots=slots, **pools._asdict())
    wide = wide_dtype(v.dtype)
    if pools.recurrent.dtype not in (wide, torch.bfloat16):
        raise DtypeError(f"{op}: pools.recurrent is {pools.recurrent.dtype}, expected {wide}, or bfloat16.")
