"""The gated activation: check the call, choose a backend, run it."""

from torch import Tensor

from kimi_linear.base.errors import ShapeError
from kimi_linear.ops.checks import describe_call, expect_floating, expect_same_device, expect_same_dtype
from kimi_linear.ops.native import refuse
from kimi_linear.ops.registry import Backend, define
from kimi_linear.ops.swiglu import cpu, reference
from kimi_linear.ops.swiglu.triton import backend as triton
from kimi_linear.ops.triton.backend import refuse_device, untried

SWIGLU = define(
    "swiglu",
    Backend("cpu", cpu.swiglu_cpu, refuse, "native: one pass forward, one backward"),
    Backend("triton", triton.swiglu_triton, refuse_device, "one launch on a GPU each way", untried),
    Backend("reference", reference.swiglu_reference, lambda call: [], "a few passes in plain PyTorch, any device"),
)


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """Gate one half of a feed-forward network's inner width by the other.

        y = silu(gate) * up,   silu(x) = x / (1 + exp(-x))
        SwiGLU, arXiv:2002.05202.

    Args:
        gate: Any shape.
        up: The shape and dtype of gate.
        backend: "cpu", "triton", "reference", or None for the best that supports the call.

    Returns:
        y, the shape and dtype of gate.

    Raises:
        ShapeError, DtypeError, DeviceError: up disagrees with gate; names it, what it is and what it should be.
        BackendError: The named backend cannot run this call; lists every backend with its reasons.

    Numerics: float32 throughout (float64 for float64), one rounding at the end.
    Cost: reads two tensors and writes one; the backward reads three, writes two, and keeps the inputs alone (backends
        cpu and triton, which runs when asked for by name).

    Example:
        >>> import torch
        >>> swiglu(torch.tensor([0.0, 100.0]), torch.tensor([3.0, 3.0]))
        tensor([  0., 300.])
    """
    op = "swiglu"
    expect_floating(op, gate=gate, up=up)
    expect_same_dtype(op, gate=gate, up=up)
    expect_same_device(op, gate=gate, up=up)
    if gate.shape != up.shape:
        raise ShapeError(f"{op}: up is {list(up.shape)}, expected {list(gate.shape)}, the shape of gate.")
    call = describe_call(gate, up, sizes={"elements": gate.numel()})
    y: Tensor = SWIGLU.choose(call, backend).run(gate, up)
    return y
