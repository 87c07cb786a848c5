"""The short convolution for many tokens, and for one token in place: check the call, choose a backend, run it."""

from typing import Literal

from torch import Tensor

from kimi_linear.base.errors import ConfigError
from kimi_linear.ops.checks import (
    describe_call,
    expect_cu_seqlens,
    expect_floating,
    expect_integer,
    expect_same_device,
    expect_shape,
)
from kimi_linear.ops.conv import chunk, cpu, decode, reference
from kimi_linear.ops.conv.triton import backend as triton_backend
from kimi_linear.ops.registry import Backend, define
from kimi_linear.ops.triton.backend import untried

Activation = Literal["silu"]

SHORT_CONV = define(
    "short_conv",
    Backend("cpu", cpu.short_conv_cpu, cpu.refuse, "native, one pass over memory each way"),
    Backend("triton", triton_backend.short_conv_triton, triton_backend.refuse, "one launch on a GPU each way", untried),
    Backend("chunk", chunk.short_conv_chunk, lambda call: [], "multiply-adds on tiles that stay in the cache"),
    Backend("reference", reference.short_conv_reference, lambda call: [], "one gather a tap, for checking"),
)
SHORT_CONV_DECODE = define(
    "short_conv_decode",
    Backend("cpu", cpu.short_conv_decode_cpu, cpu.refuse_decode, "native, in place"),
    Backend(
        *("triton", triton_backend.short_conv_decode_triton, triton_backend.refuse_decode),
        *("one launch on a GPU, in place", untried),
    ),
    Backend("reference", decode.short_conv_decode_reference, decode.refuse_gradients, "the equation, in place"),
)


def short_conv(
    x: Tensor,
    weight: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: Activation | None = "silu",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve every channel causally with its own few taps, then apply SiLU.

        y_t[d] = silu(sum_j weight[d, j] * x_{t - (W - 1) + j}[d]),  j = 0 .. W - 1
        x_{-1}, x_{-2}, ... come from initial_state, or are zero.

    The last tap hits the current token (cross-correlation); there is no bias. This is the convolution after the q, k
    and v projections of Kimi Linear, arXiv:2510.26692.

    Args:
        x: Inputs, [B, T, D].
        weight: Taps, [D, W], or [D, 1, W] as checkpoints store them; any W >= 1.
        initial_state: The W - 1 inputs before the first token, oldest first, [N, D, W - 1]. Default: zeros.
        cu_seqlens: Token offsets of packed sequences, [N + 1], int32 or int64, first 0 and last T; needs B == 1. No
            sequence sees another. Empty ones are allowed and return their initial state.
        activation: "silu" or None.
        backend: "cpu", "triton", "chunk", "reference", or None for the best that supports the call.

    Returns:
        y [B, T, D], and the last W - 1 inputs of each sequence, [N, D, W - 1]; both in the dtype of x. N is B without
        cu_seqlens. A call that continues from the returned state equals one call over the whole.

    Raises:
        ShapeError, DtypeError, DeviceError: An argument disagrees; names it, what it is and what it should be.
        ConfigError: Unknown activation.
        BackendError: The named backend cannot run this call; lists every backend with its reasons.

    Numerics: multiplies and sums in float32 (float64 for float64 x), activation included; one rounding at the end.
    Cost: T D W multiply-adds forward, three times that backward. The backward keeps the inputs alone and computes the
        pre-activation again. Backends cpu and chunk hold no temporary of size [T, D]; reference holds several in
        float32. Backends cpu and triton take 16 taps at most; triton runs when asked for by name, and holds backward
        D W float32 a run of rows, 16 to 1024.

    Example:
        >>> import torch
        >>> x, weight = torch.randn(2, 5, 8), torch.randn(8, 4)
        >>> y, state = short_conv(x, weight)
        >>> y.shape, state.shape
        (torch.Size([2, 5, 8]), torch.Size([2, 8, 3]))
    """
    op = "short_conv"
    expect_floating(op, x=x, weight=weight, initial_state=initial_state)
    expect_shape(op, "x", x, (None, None, None), "B, T, D")
    B, T, D = x.shape
    weight = _taps(op, weight, D)
    W = weight.shape[1]
    expect_same_device(op, x=x, weight=weight, initial_state=initial_state)
    N = B if cu_seqlens is None else expect_cu_seqlens(op, cu_seqlens, B, x.device)
    if initial_state is not None:
        expect_shape(op, "initial_state", initial_state, (N, D, W - 1), "N, D, W - 1")
    silu = _is_silu(op, activation)
    given = (("packed", cu_seqlens), ("initial_state", initial_state))
    features = [name for name, tensor in given if tensor is not None]
    call = describe_call(x, weight, initial_state, sizes={"B": B, "T": T, "D": D, "W": W, "N": N}, features=features)
    y, final_state = SHORT_CONV.choose(call, backend).run(x, weight, initial_state, cu_seqlens, silu)
    return y, final_state


def short_conv_decode(
    x: Tensor,
    weight: Tensor,
    pool: Tensor,
    slots: Tensor,
    *,
    activation: Activation | None = "silu",
    backend: str | None = None,
) -> Tensor:
    """Convolve one token a sequence and move its history on, in place; see `short_conv`.

    Args:
        x: Inputs of one step, [N, D].
        weight: Taps, [D, W] or [D, 1, W].
        pool: Histories, [S, D, W - 1], oldest first; the rows named by `slots` change, all others stay bit-identical.
        slots: Row of the pool of each sequence, [N], int32 or int64, no row twice; -1: skip, its output is zero.
        activation: "silu" or None.
        backend: "cpu", "triton", "reference", or None.

    Returns:
        y [N, D] in the dtype of x.

    Raises:
        ShapeError, DtypeError, DeviceError, ConfigError, BackendError: As for `short_conv`; BackendError too when a
            gradient is needed, because an update in place has none.

    Cost: N D W multiply-adds; reads and writes N D (W - 1) elements of the pool.

    Example:
        >>> import torch
        >>> pool = torch.zeros(3, 8, 3)
        >>> short_conv_decode(torch.randn(2, 8), torch.randn(8, 4), pool, torch.tensor([2, 0])).shape
        torch.Size([2, 8])
    """
    op = "short_conv_decode"
    expect_floating(op, x=x, weight=weight, pool=pool)
    expect_shape(op, "x", x, (None, None), "N, D")
    N, D = x.shape
    weight = _taps(op, weight, D)
    expect_shape(op, "pool", pool, (None, D, weight.shape[1] - 1), "S, D, W - 1")
    expect_shape(op, "slots", slots, (N,), "N")
    expect_integer(op, "slots", slots)
    expect_same_device(op, x=x, weight=weight, pool=pool, slots=slots)
    call = describe_call(x, weight, pool, sizes={"N": N, "D": D, "W": weight.shape[1]})
    y: Tensor = SHORT_CONV_DECODE.choose(call, backend).run(x, weight, pool, slots, _is_silu(op, activation))
    return y


def _taps(op: str, weight: Tensor, features: int) -> Tensor:
    # [D, 1, W] is the layout of a depthwise torch.nn.Conv1d.
    if weight.dim() == 3:
        expect_shape(op, "weight", weight, (features, 1, None), "D, 1, W")
        weight = weight.squeeze(1)
    expect_shape(op, "weight", weight, (features, None), "D, W")
    return weight


def _is_silu(op: str, activation: str | None) -> bool:
    if activation not in ("silu", None):
        raise ConfigError(f"{op}: activation is {activation!r}, expected 'silu' or None.")
    return activation == "silu"
