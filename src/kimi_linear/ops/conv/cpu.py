"""The short convolution on the CPU: csrc/conv.cpp, one pass over memory forward and one backward."""

import torch
from torch import Tensor

from kimi_linear.ops import native
from kimi_linear.ops.checks import check_cu_seqlens_values, check_slots_values
from kimi_linear.ops.conv import autograd, decode
from kimi_linear.ops.native.library import DTYPES
from kimi_linear.ops.registry import Call

MOST_TAPS = 16


def refuse(call: Call) -> list[str]:
    """Return why the native convolution cannot run a call."""
    taps = call.sizes["W"]
    return native.refuse(call) + ([f"takes {MOST_TAPS} taps at most, not {taps}"] if taps > MOST_TAPS else [])


def refuse_decode(call: Call) -> list[str]:
    """Return why the native step cannot run a call."""
    return native.refuse(call) + decode.refuse_gradients(call)


def _known(x: Tensor) -> Tensor:
    # In a dtype the kernels read.
    return x.contiguous() if x.dtype in DTYPES else x.float().contiguous()


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _history(state: Tensor | None, x: Tensor) -> Tensor | None:
    return None if state is None else state.to(x.dtype).contiguous()


def _offsets(cu_seqlens: Tensor | None) -> Tensor | None:
    return None if cu_seqlens is None else cu_seqlens.long().contiguous()


@torch.library.custom_op("kimi_linear::short_conv_cpu", mutates_args=())
def short_conv_cpu(
    x: Tensor, weight: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """Return y [B, T, D] and the final state [N, D, W - 1]."""
    rows, taps, offsets = _rows(x), _known(weight), _offsets(cu_seqlens)
    batch, tokens, channels = x.shape
    sequences, width = batch if offsets is None else offsets.shape[0] - 1, taps.shape[1]
    y, final = x.new_empty(x.shape), x.new_empty(sequences, channels, width - 1)
    try:
        native.kernel("short_conv", "ipiipippppiiiii")(
            *(DTYPES[x.dtype], rows, rows.stride(0), rows.stride(1), taps, DTYPES[taps.dtype]),
            *(_history(initial_state, x), offsets, y, final, sequences, tokens, channels, width, silu),
        )
    except RuntimeError:
        if cu_seqlens is not None:
            check_cu_seqlens_values(cu_seqlens, tokens)
        raise
    return y, final


@torch.library.custom_op("kimi_linear::short_conv_cpu_backward", mutates_args=())
def short_conv_cpu_backward(
    grad_y: Tensor,
    grad_final: Tensor,
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and initial_state; the pre-activation is computed again."""
    rows, taps, offsets = _rows(x), _known(weight), _offsets(cu_seqlens)
    batch, tokens, channels = x.shape
    sequences, width = batch if offsets is None else offsets.shape[0] - 1, taps.shape[1]
    grad_x, grad_weight = x.new_empty(x.shape), taps.new_empty(taps.shape)
    # Absent, it is empty, and the kernel gets None for it.
    grad_state = x.new_empty(0 if initial_state is None else initial_state.shape, dtype=torch.float32)
    native.kernel("short_conv_backward", "ipppiipippppp" + "iiiii")(
        *(DTYPES[x.dtype], grad_y.contiguous(), grad_final.contiguous(), rows, rows.stride(0), rows.stride(1)),
        *(taps, DTYPES[taps.dtype], _history(initial_state, x), offsets, grad_x, grad_weight),
        *(None if initial_state is None else grad_state, sequences, tokens, channels, width, silu),
    )
    state_dtype = x.dtype if initial_state is None else initial_state.dtype
    return grad_x, grad_weight.to(weight.dtype), grad_state.to(state_dtype)


@torch.library.custom_op("kimi_linear::short_conv_decode_cpu", mutates_args=("pool",))
def short_conv_decode_cpu(x: Tensor, weight: Tensor, pool: Tensor, slots: Tensor, silu: bool) -> Tensor:
    """Return y [N, D] and move the named histories on by one token."""
    taps, y, rows = _known(weight), x.new_empty(x.shape), _known(pool)
    try:
        native.kernel("short_conv_decode", "ippiipppiiiii")(
            *(DTYPES[x.dtype], x.contiguous(), taps, DTYPES[taps.dtype], DTYPES[rows.dtype], rows),
            *(slots.long().contiguous(), y, *x.shape[:1], pool.shape[0], *taps.shape, silu),
        )
    except RuntimeError:
        check_slots_values(slots, pool.shape[0])
        raise
    if rows is not pool:
        pool.copy_(rows)
    return y


@short_conv_decode_cpu.register_fake
def _(x: Tensor, weight: Tensor, pool: Tensor, slots: Tensor, silu: bool) -> Tensor:
    return x.new_empty(x.shape)


autograd.register(short_conv_cpu, short_conv_cpu_backward)
