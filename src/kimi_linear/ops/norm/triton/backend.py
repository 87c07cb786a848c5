"""The `triton` backend of the norms: when it can run, and its operators. Imports triton when it first runs."""

from typing import Any

import torch
from torch import Tensor

from kimi_linear.ops.norm import autograd
from kimi_linear.ops.registry import Call
from kimi_linear.ops.triton.backend import refuse_device

# Channels of a row that fit the registers of a program.
MOST_CHANNELS = 16384
# Elements of a program's tile, of a row at least.
TILE = 2048
# Up to here they fit with their gradients too; beyond, the backward goes over a row twice, in these blocks.
HELD_CHANNELS = 8192
WIDE = {"BLOCK": 1024, "ROWS": 4, "num_warps": 8}


def refuse(call: Call) -> list[str]:
    """Refuse what the kernels do not compute."""
    channels = max(call.sizes.get(letter, 0) for letter in "DVK")
    wide = [f"takes rows of {MOST_CHANNELS} at most, not {channels}"] if channels > MOST_CHANNELS else []
    return refuse_device(call) + wide


def tiles(D: int) -> dict[str, int]:
    """Return the padded row, the rows of a tile and the warps, from a fixed table.

    They depend on D alone, so that a row has the same bits in every batch.
    """
    from kimi_linear.ops.triton.launch import padded

    DP = padded(D)
    return {"DP": DP, "ROWS": max(1, TILE // DP), "num_warps": min(16, max(4, DP // 512))}


def programs(count: int, D: int) -> tuple[int, int]:
    """Return how many programs share so many tiles, each a run of them, and the tiles of a run.

    Few, as each writes D sums for the gradient of the weight, and enough to fill a large GPU.
    """
    most = 1024 if D <= 1024 else 512 if D <= 4096 else 256
    run = max(1, -(-count // most))
    return -(-count // run), run


def _rows(x: Tensor) -> Tensor:
    # [M, D], any distance from row to row, no distance within a row: a slice of the last axis is not copied.
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def forward(x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float, **kind: int | bool) -> Tensor:
    """Return y; `kind` is what the kernel is compiled for. One launch."""
    from kimi_linear.ops.norm.triton.kernels import forward_kernel
    from kimi_linear.ops.triton.launch import start

    rows, gates, y = _rows(x), None if gate is None else _rows(gate), x.new_empty(x.shape)
    (M, D), weight = rows.shape, None if weight is None else weight.contiguous()
    table = tiles(D)
    start(
        *(forward_kernel, -(-M // table["ROWS"]), rows, gates, weight, y),
        *(M, float(eps), rows.stride(0), 0 if gates is None else gates.stride(0)),
        **table,
        D=D,
        WEIGHT=weight is not None,
        **kind,
    )
    return y


def backward(
    grad_y: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float, **kind: int | bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of x, gate and weight: one launch, then the sum over the programs, in order."""
    from kimi_linear.ops.norm.triton import kernels
    from kimi_linear.ops.triton.launch import start

    rows, grads, gates = _rows(x), _rows(grad_y), None if gate is None else _rows(gate)
    (M, D), weight = rows.shape, None if weight is None else weight.contiguous()
    grad_x, grad_gate = x.new_empty(x.shape), None if gate is None else gate.new_empty(gate.shape)
    table = WIDE if D > HELD_CHANNELS else tiles(D)
    many, run = -(-M // table["ROWS"]), 1
    if weight is not None and table is not WIDE:
        many, run = programs(many, D)
    parts = None if weight is None else x.new_empty(many, D, dtype=torch.float32)
    given = (grads, rows, gates, weight, grad_x, grad_gate, parts)
    strides = (grads.stride(0), rows.stride(0), 0 if gates is None else gates.stride(0))
    options: dict[str, Any] = {**table, "D": D, "WEIGHT": weight is not None, **kind}
    if table is WIDE:
        start(kernels.wide_backward_kernel, many, *given, M, float(eps), *strides, **options)
    else:
        options["HOLD"] = table["DP"] <= 4096
        start(kernels.backward_kernel, many, *given, M, run, float(eps), *strides, **options)
    return grad_x, grad_gate, None if weight is None or parts is None else parts.sum(0).to(weight.dtype)


def _gated(x: Tensor, silu: bool) -> dict[str, Any]:
    return {"TERMS": x.shape[-1], "ROUND": False, "GATE": 2 if silu else 1}


def _given(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


@torch.library.custom_op("kimi_linear::rms_norm_triton", mutates_args=())
def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return y in the dtype of x."""
    return forward(x, None, weight, eps, TERMS=x.shape[-1], ROUND=True, GATE=0)


@torch.library.custom_op("kimi_linear::rms_norm_triton_backward", mutates_args=())
def rms_norm_triton_backward(grad_y: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight."""
    grad_x, _, grad_weight = backward(grad_y, x, None, weight, eps, TERMS=x.shape[-1], ROUND=True, GATE=0)
    return grad_x, _given(grad_weight)


@torch.library.custom_op("kimi_linear::gated_rms_norm_triton", mutates_args=())
def gated_rms_norm_triton(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool) -> Tensor:
    """Return y in the dtype of x."""
    return forward(x, gate, weight, eps, **_gated(x, silu))


@torch.library.custom_op("kimi_linear::gated_rms_norm_triton_backward", mutates_args=())
def gated_rms_norm_triton_backward(
    grad_y: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, gate and weight: one launch, then the sum over the programs, in order."""
    grad_x, grad_gate, grad_weight = backward(grad_y, x, gate, weight, eps, **_gated(x, silu))
    return grad_x, _given(grad_gate), _given(grad_weight)


@torch.library.custom_op("kimi_linear::l2_norm_triton", mutates_args=())
def l2_norm_triton(x: Tensor, eps: float) -> Tensor:
    """Return y in the dtype of x."""
    return forward(x, None, None, eps, TERMS=1, ROUND=False, GATE=0)


@torch.library.custom_op("kimi_linear::l2_norm_triton_backward", mutates_args=())
def l2_norm_triton_backward(grad_y: Tensor, x: Tensor, eps: float) -> Tensor:
    """Return the gradient of x."""
    return backward(grad_y, x, None, None, eps, TERMS=1, ROUND=False, GATE=0)[0]


autograd.register(rms_norm_triton, rms_norm_triton_backward)
autograd.register(gated_rms_norm_triton, gated_rms_norm_triton_backward)
autograd.register(l2_norm_triton, l2_norm_triton_backward)
