"""Cross entropy of a linear head: check the call, choose a backend, run it, reduce."""

from typing import Literal

from torch import Tensor

from kimi_linear.base.errors import ConfigError
from kimi_linear.ops.autocast import cast_inputs
from kimi_linear.ops.checks import describe_call, expect_floating, expect_integer, expect_same_device, expect_shape
from kimi_linear.ops.cross_entropy import chunk as chunked
from kimi_linear.ops.cross_entropy import cpu, reference
from kimi_linear.ops.cross_entropy.triton import backend as triton
from kimi_linear.ops.native import refuse
from kimi_linear.ops.registry import Backend, define
from kimi_linear.ops.triton.backend import refuse_device, untried

Reduction = Literal["mean", "sum", "none"]

LINEAR_CROSS_ENTROPY = define(
    "linear_cross_entropy",
    Backend("cpu", cpu.run, refuse, "native, a chunk of tokens at a time; float32 logits, never all"),
    Backend(
        "triton", triton.run, refuse_device, "a chunk of tokens at a time; one kernel between the products", untried
    ),
    Backend("chunk", chunked.run, lambda call: [], "a chunk of tokens at a time; never all logits"),
    Backend("reference", reference.run, lambda call: [], "all logits at once, for checking"),
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    chunk: int | None = None,
    reduction: Reduction = "mean",
    backend: str | None = None,
) -> Tensor:
    """Return the cross entropy of the logits `hidden @ weight.T` without holding all of them.

        z = weight hidden_m;  loss_m = log sum_v exp(z_v) - z_{label_m}  [nats]

    Args:
        hidden: Final hidden states, [M, D].
        weight: Output embedding, [V, D].
        labels: Row of weight that each row of hidden should predict, [M], int64 or int32. Already shifted.
        ignore_index: Rows with this label have loss 0, no gradient and no weight in the mean.
        chunk: Rows of logits held at a time. Default: max(128, 2**22 // V); backend cpu, twice that and at most 1024;
            backend triton, as many as 128 MiB hold, in multiples of 128.
        reduction: "mean" over the rows that count (0 if none does), "sum", or "none" for [M].
        backend: "cpu", "triton", "chunk", "reference", or None for the best that supports the call.

    Returns:
        The loss, float32 (float64 for float64 hidden); a scalar, or [M] with reduction "none".

    Raises:
        ShapeError, DtypeError, DeviceError: An argument disagrees, or a label is neither a row of weight nor
            ignore_index; names it, what it is and what it should be. Backend triton looks at labels on the CPU alone,
            or when KIMI_LINEAR_DEBUG is on; elsewhere such a label makes the loss and the gradients NaN.
        ConfigError: Unknown reduction, or chunk below 1.
        BackendError: The named backend cannot run this call; lists every backend with its reasons.

    Numerics: softmax, log-sum-exp and sums over rows in float32 (float64 for float64 hidden). Matrix products run in
        the dtype of hidden, or that of the active autocast, and accumulate in float32; bfloat16 products round each
        logit once (backends cpu and reference keep it in float32), float16 is widened to float32 first. Backends chunk
        and triton round a logit's gradient to the dtype of the products; triton adds dweight up in float32 unrounded.
    Cost: M V D multiply-adds a product; one product forward, three with gradients (four with reduction "none"). Beside
        the results, backend chunk holds chunk * V logits twice: in the dtype of the products and in float32; backend
        cpu holds them once, and the weight in the dtype of the products, twice with gradients; backend triton once, in
        the dtype of the products. With gradients and a summed or mean loss all three keep dhidden and a float32
        dweight from forward to backward. Backend triton never waits for the device.

    Example:
        >>> import torch
        >>> linear_cross_entropy(torch.zeros(3, 4), torch.zeros(8, 4), torch.tensor([0, 5, -100]))
        tensor(2.0794)
    """
    op = "linear_cross_entropy"
    expect_floating(op, hidden=hidden, weight=weight)
    expect_shape(op, "hidden", hidden, (None, None), "M, D")
    M, D = hidden.shape
    expect_shape(op, "weight", weight, (None, D), "V, D")
    expect_shape(op, "labels", labels, (M,), "M")
    expect_integer(op, "labels", labels)
    expect_same_device(op, hidden=hidden, weight=weight, labels=labels)
    if reduction not in ("mean", "sum", "none"):
        raise ConfigError(f"{op}: reduction is {reduction!r}, expected 'mean', 'sum' or 'none'.")
    if chunk is not None and chunk < 1:
        raise ConfigError(f"{op}: chunk is {chunk}, expected a number of rows, at least 1.")
    # The weight stays as it is: it is cast once inside, and its gradient keeps its precision.
    (hidden,) = cast_inputs(hidden)
    call = describe_call(hidden, weight, sizes={"M": M, "D": D, "V": weight.shape[0]}, features=(reduction,))
    run = LINEAR_CROSS_ENTROPY.choose(call, backend).run
    loss: Tensor = run(hidden, weight, labels.long(), ignore_index, chunk, reduction != "none")
    if reduction == "mean":
        # Without a row that counts the sum is zero, and so is the mean.
        return loss / (labels != ignore_index).sum().clamp(min=1)
    return loss
