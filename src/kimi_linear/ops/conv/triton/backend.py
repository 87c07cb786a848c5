"""The `triton` backend of the short convolution: when it runs, and its operators. Imports triton when it first does."""

from typing import Any

import torch
from torch import Tensor

from kimi_linear.base import env
from kimi_linear.ops.checks import check_cu_seqlens_values, check_slots_values
from kimi_linear.ops.conv import autograd, decode
from kimi_linear.ops.registry import Call
from kimi_linear.ops.triton.backend import refuse_device

# Taps a program can hold in registers, with as many inputs and gradients.
MOST_TAPS = 16
# Programs that fill a large GPU; runs are as long as leaves so many, between these lengths.
PROGRAMS = 2048
RUNS = (1024, 16)
DECODE_WARPS = 4


def refuse(call: Call) -> list[str]:
    """Refuse what the kernels do not compute."""
    taps = call.sizes["W"]
    return refuse_device(call) + ([f"takes {MOST_TAPS} taps at most, not {taps}"] if taps > MOST_TAPS else [])


def refuse_decode(call: Call) -> list[str]:
    """Refuse what the kernel does not compute, and gradients."""
    return refuse(call) + decode.refuse_gradients(call)


def tiles(width: int, dtype: torch.dtype, backward: bool) -> tuple[int, int]:
    """Return the channels of a program, one warp, and the rows it loads at once, from a fixed table."""
    if width > 8:
        return (32 if backward else 64), 4
    if width > 4:
        return (64 if backward else 128), 4
    return 128, 8 if dtype != torch.float32 and not backward else 4


def run_length(rows: int, blocks: int) -> int:
    """Return the rows of a run: a power of two, of the shape alone, as the order of sums depends on it."""
    length, least = RUNS
    while length > least and -(-rows // length) * blocks < PROGRAMS:
        length //= 2
    return length


def _look(x: Tensor) -> bool:
    # On a GPU a look at values would wait for it.
    return not x.is_cuda or bool(env.read("KIMI_LINEAR_DEBUG"))


def _check_offsets(cu_seqlens: Tensor | None, tokens: int) -> None:
    if cu_seqlens is not None and _look(cu_seqlens):
        check_cu_seqlens_values(cu_seqlens, tokens)


class _Run:
    """One call: its arguments as the kernels read them, and the launch that both ways share."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        initial: Tensor | None,
        cu_seqlens: Tensor | None,
        silu: bool,
        backward: bool = False,
    ) -> None:
        (B, T, D), W = x.shape, weight.shape[1]
        self.x = x if x.stride(2) == 1 else x.contiguous()
        self.weight = weight.contiguous()
        self.initial = None if initial is None else initial.contiguous()
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        rows = B * T + self.sequences * (W - 1)
        block, group = tiles(W, x.dtype, backward)
        blocks = -(-D // block)
        run = run_length(rows, blocks)
        self.runs = -(-rows // run)
        self.programs = self.runs * blocks
        self.sizes = (T, self.sequences, rows, run, *self.x.stride()[:2])
        self.options: dict[str, Any] = {"D": D, "W": W, "BLOCK": block, "GROUP": group, "SILU": silu, "num_warps": 1}
        self.options |= {"PACKED": cu_seqlens is not None, "HAS_INITIAL": initial is not None}

    @property
    def given(self) -> tuple[Tensor | None, ...]:
        """What the forward kernel reads."""
        return self.x, self.weight, self.initial, self.cu_seqlens


def forward(
    x: Tensor, weight: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """Return y and the final states: one launch."""
    from kimi_linear.ops.conv.triton.kernels import forward_kernel
    from kimi_linear.ops.triton.launch import start

    run = _Run(x, weight, initial, cu_seqlens, silu)
    y, final = x.new_empty(x.shape), x.new_empty(run.sequences, x.shape[2], weight.shape[1] - 1)
    start(forward_kernel, run.programs, *run.given, y, final, *run.sizes, **run.options)
    return y, final


def backward(
    grad_y: Tensor,
    grad_final: Tensor,
    x: Tensor,
    weight: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and initial (empty without): one launch, then the sum over runs, in order."""
    from kimi_linear.ops.conv.triton.kernels import backward_kernel
    from kimi_linear.ops.triton.launch import start

    run = _Run(x, weight, initial, cu_seqlens, silu, backward=True)
    (D, W), grad_x = weight.shape, x.new_empty(x.shape)
    grad_state = None if initial is None else initial.new_empty(initial.shape)
    parts = x.new_empty(run.runs, W, D, dtype=torch.float32)
    start(
        *(backward_kernel, run.programs, grad_y.contiguous(), grad_final.contiguous(), *run.given),
        *(grad_x, grad_state, parts, *run.sizes),
        **run.options,
    )
    grad_weight = parts.sum(0).t().to(weight.dtype).contiguous()
    return grad_x, grad_weight, x.new_empty(0) if grad_state is None else grad_state


@torch.library.custom_op("kimi_linear::short_conv_triton", mutates_args=())
def short_conv_triton(
    x: Tensor, weight: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """Return y [B, T, D] and the final state [N, D, W - 1]."""
    _check_offsets(cu_seqlens, x.shape[1])
    return forward(x, weight, initial_state, cu_seqlens, silu)


@torch.library.custom_op("kimi_linear::short_conv_triton_backward", mutates_args=())
def short_conv_triton_backward(
    grad_y: Tensor,
    grad_final: Tensor,
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and initial_state."""
    return backward(grad_y, grad_final, x, weight, initial_state, cu_seqlens, silu)


autograd.register(short_conv_triton, short_conv_triton_backward)


@torch.library.custom_op("kimi_linear::short_conv_decode_triton", mutates_args=("pool",))
def short_conv_decode_triton(x: Tensor, weight: Tensor, pool: Tensor, slots: Tensor, silu: bool) -> Tensor:
    """Return y [N, D] and move the named histories on by one token."""
    if _look(slots):
        check_slots_values(slots, pool.shape[0])
    return step(x, weight, pool, slots, silu)


def step(x: Tensor, weight: Tensor, pool: Tensor, slots: Tensor, silu: bool) -> Tensor:
    """Run the kernel, one launch; safe in a CUDA graph, the host reads nothing."""
    from kimi_linear.ops.conv.triton.kernels import decode_kernel
    from kimi_linear.ops.triton.launch import start

    (N, D), W, block = x.shape, weight.shape[1], 32 * DECODE_WARPS
    y = x.new_empty(x.shape)
    start(
        *(decode_kernel, N * -(-D // block), x.contiguous(), weight.contiguous(), pool, slots.contiguous(), y),
        *(pool.shape[0], *pool.stride()),
        D=D,
        W=W,
        BLOCK=block,
        SILU=silu,
        num_warps=DECODE_WARPS,
    )
    return y


@short_conv_decode_triton.register_fake
def _(x: Tensor, weight: Tensor, pool: Tensor, slots: Tensor, silu: bool) -> Tensor:
    return x.new_empty(x.shape)
