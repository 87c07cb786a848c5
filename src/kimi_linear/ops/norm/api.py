"""RMSNorm, gated RMSNorm and L2 norm over the last axis: check the call, choose a backend, run it."""

from typing import Literal

from torch import Tensor

from kimi_linear.base.errors import ConfigError, ShapeError
from kimi_linear.ops.checks import describe_call, expect_floating, expect_same_device, expect_shape
from kimi_linear.ops.native import refuse
from kimi_linear.ops.norm import cpu, reference
from kimi_linear.ops.norm.triton import backend as triton
from kimi_linear.ops.registry import Backend, define
from kimi_linear.ops.triton.backend import untried

GateActivation = Literal["sigmoid", "silu"]

_SUMMARY = "a few passes in plain PyTorch, any device"
_NATIVE = "native, one pass over memory each way"
_TRITON = "one launch on a GPU each way"
RMS_NORM = define(
    "rms_norm",
    Backend("cpu", cpu.rms_norm_cpu, refuse, _NATIVE),
    Backend("triton", triton.rms_norm_triton, triton.refuse, _TRITON, untried),
    Backend("reference", reference.rms_norm_reference, lambda call: [], _SUMMARY),
)
GATED_RMS_NORM = define(
    "gated_rms_norm",
    Backend("cpu", cpu.gated_rms_norm_cpu, refuse, _NATIVE),
    Backend("triton", triton.gated_rms_norm_triton, triton.refuse, _TRITON, untried),
    Backend("reference", reference.gated_rms_norm_reference, lambda call: [], _SUMMARY),
)
L2_NORM = define(
    "l2_norm",
    Backend("cpu", cpu.l2_norm_cpu, refuse, _NATIVE),
    Backend("triton", triton.l2_norm_triton, triton.refuse, _TRITON, untried),
    Backend("reference", reference.l2_norm_reference, lambda call: [], _SUMMARY),
)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, backend: str | None = None) -> Tensor:
    """Scale every row to unit mean square, then every channel by its weight.

        y = weight * cast(x (mean(x^2) + eps)^(-1/2))
        RMSNorm, arXiv:1910.07467, with the cast to the dtype of x before the weight.

    Args:
        x: [..., D].
        weight: [D].
        eps: Added to the mean square, inside the root.
        backend: "cpu", "triton", "reference", or None for the best that supports the call.

    Returns:
        y [..., D] in the dtype of x.

    Raises:
        ShapeError, DtypeError, DeviceError: An argument disagrees; names it, what it is and what it should be.
        BackendError: The named backend cannot run this call; lists every backend with its reasons.

    Numerics: statistics in float32 (float64 for float64 x). The order of cast and weight is that of the released
        model; swapping them changes bfloat16 results by one rounding.
    Cost: one pass over memory forward, one backward (backends cpu and triton, which runs when asked for by name and
        takes rows of 16,384 at most); the backward keeps x and forms the statistics again.

    Example:
        >>> import torch
        >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), eps=0.0).square().mean()
        tensor(1.)
    """
    op = "rms_norm"
    expect_floating(op, x=x, weight=weight)
    _expect_rows(op, x)
    expect_shape(op, "weight", weight, (x.shape[-1],), "D, the last axis of x")
    expect_same_device(op, x=x, weight=weight)
    call = describe_call(x, weight, sizes={"M": x.numel() // x.shape[-1], "D": x.shape[-1]})
    y: Tensor = RMS_NORM.choose(call, backend).run(x, weight, eps)
    return y


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    *,
    eps: float,
    activation: GateActivation = "sigmoid",
    backend: str | None = None,
) -> Tensor:
    """Normalise every row, scale it by the weight, then gate it: the output of a Kimi Delta Attention head.

        y = cast(x (mean(x^2) + eps)^(-1/2) * weight * act(gate)),  act = sigmoid or silu
        Kimi Linear, arXiv:2510.26692, whose gate is the sigmoid; silu is Gated DeltaNet's, arXiv:2412.06464.

    Args:
        x: [..., V], one head a row.
        gate: Logits of the output gate, the shape of x.
        weight: [V], shared by the heads.
        eps: Added to the mean square, inside the root.
        activation: "sigmoid" or "silu", applied to the gate.
        backend: "cpu", "triton", "reference", or None for the best that supports the call.

    Returns:
        y [..., V] in the dtype of x.

    Raises:
        ShapeError, DtypeError, DeviceError: An argument disagrees; names it, what it is and what it should be.
        ConfigError: Unknown activation.
        BackendError: The named backend cannot run this call; lists every backend with its reasons.

    Numerics: float32 throughout (float64 for float64 x), one rounding at the end: unlike `rms_norm`.
    Cost: one pass over memory forward, one backward (backends cpu and triton, which runs when asked for by name and
        takes rows of 16,384 at most); the backward keeps the inputs alone.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 5, 4, 8)
        >>> gated_rms_norm(x, torch.zeros_like(x), torch.ones(8), eps=1e-5).shape
        torch.Size([2, 5, 4, 8])
    """
    op = "gated_rms_norm"
    expect_floating(op, x=x, gate=gate, weight=weight)
    _expect_rows(op, x)
    expect_shape(op, "gate", gate, x.shape, "the shape of x")
    expect_shape(op, "weight", weight, (x.shape[-1],), "V, the last axis of x")
    expect_same_device(op, x=x, gate=gate, weight=weight)
    if activation not in ("sigmoid", "silu"):
        raise ConfigError(f"{op}: activation is {activation!r}, expected 'sigmoid' or 'silu'.")
    call = describe_call(x, gate, weight, sizes={"M": x.numel() // x.shape[-1], "V": x.shape[-1]})
    y: Tensor = GATED_RMS_NORM.choose(call, backend).run(x, gate, weight, eps, activation == "silu")
    return y


def l2_norm(x: Tensor, *, eps: float = 1e-6, backend: str | None = None) -> Tensor:
    """Scale every row to unit length.

        y = x (sum(x^2) + eps)^(-1/2)
        The query and key normalisation of Kimi Linear, arXiv:2510.26692.

    Args:
        x: [..., K], one head a row.
        eps: Added to the sum of squares, inside the root; a row of zeros stays zero.
        backend: "cpu", "triton", "reference", or None for the best that supports the call.

    Returns:
        y [..., K] in the dtype of x.

    Raises:
        ShapeError, DtypeError: x has no axis to normalise, or is not floating.
        BackendError: The named backend cannot run this call; lists every backend with its reasons.

    Numerics: float32 (float64 for float64 x), one rounding at the end.
    Cost: one pass over memory forward, one backward (backends cpu and triton, which runs when asked for by name and
        takes rows of 16,384 at most); the backward keeps x and computes the length again.

    Example:
        >>> import torch
        >>> l2_norm(torch.tensor([3.0, 4.0]), eps=0.0)
        tensor([0.6000, 0.8000])
    """
    op = "l2_norm"
    expect_floating(op, x=x)
    _expect_rows(op, x)
    call = describe_call(x, sizes={"M": x.numel() // x.shape[-1], "K": x.shape[-1]})
    y: Tensor = L2_NORM.choose(call, backend).run(x, eps)
    return y


def _expect_rows(op: str, x: Tensor) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ShapeError(f"{op}: x is {list(x.shape)}, expected [..., D] with D >= 1.")
