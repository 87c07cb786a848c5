"""The linear layer: check the call, choose a backend, run it."""

from torch import Tensor

from kimi_linear.base.errors import ShapeError
from kimi_linear.ops.autocast import cast_inputs
from kimi_linear.ops.checks import describe_call, expect_floating, expect_same_device, expect_shape
from kimi_linear.ops.linear import cpu, reference
from kimi_linear.ops.native import refuse
from kimi_linear.ops.registry import Backend, define

LINEAR = define(
    "linear",
    Backend("cpu", cpu.linear_cpu, refuse, "native: packed panels, float32 sums, the same bits whatever the batch"),
    Backend("reference", reference.linear_reference, lambda call: [], "torch's own product, any device"),
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Apply a linear map to every row.

        y = x weight^T + bias

    Args:
        x: [..., K].
        weight: [N, K]. May be wider than x, as a float32 weight is under autocast: it is rounded to the dtype of x
            for the product, and its gradient keeps its own dtype.
        bias: [N], or None.
        backend: "cpu", "reference", or None for the best that supports the call.

    Returns:
        y [..., N] in the dtype of x, or that of the active autocast.

    Raises:
        ShapeError, DtypeError, DeviceError: An argument disagrees; names it, what it is and what it should be.
        BackendError: The named backend cannot run this call; lists every backend with its reasons.

    Numerics: operands in the dtype of x, sums in float32 (float64 for float64 x), one rounding at the end. Backend cpu
        adds the bias before that rounding, and a row of y has the same bits in a batch of any size.
    Cost: 2 M N K operations forward and twice that backward, for M rows. Backend cpu packs the weight anew in every
        call of many rows, a copy of its size; keeps x and weight for the backward.

    Example:
        >>> import torch
        >>> linear(torch.ones(2, 3), torch.full((1, 3), 2.0), torch.ones(1))
        tensor([[7.],
                [7.]])
    """
    op = "linear"
    expect_floating(op, x=x, weight=weight, bias=bias)
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ShapeError(f"{op}: x is {list(x.shape)} and weight {list(weight.shape)}, expected [..., K] and [N, K].")
    if bias is not None:
        expect_shape(op, "bias", bias, (weight.shape[0],), "N, the rows of weight")
    expect_same_device(op, x=x, weight=weight, bias=bias)
    (x,) = cast_inputs(x)
    N, K = weight.shape
    call = describe_call(x, weight, bias, sizes={"M": x.numel() // max(K, 1), "N": N, "K": K})
    y: Tensor = LINEAR.choose(call, backend).run(x, weight, bias)
    return y
