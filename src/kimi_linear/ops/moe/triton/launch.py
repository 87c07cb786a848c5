"""From tensors to launches, forward and backward. The host reads no value, so that a CUDA graph can hold them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kimi_linear.ops.moe.runs import sort_by_expert
from kimi_linear.ops.moe.triton import kernels
from kimi_linear.ops.triton.launch import padded, start


@dataclass(frozen=True)
class Tiles:
    """Tile sizes, warps and stages."""

    # Rows of an expert, and columns, of a product, and of the one with gradients of the activation behind it.
    rows: int
    columns: int
    gradient_columns: int
    # What a product sums at a time.
    depth: int
    warps: int
    stages: int
    # Rows and columns of a matrix's gradient, and its warps.
    square: tuple[int, int]
    square_warps: int


def tiles(dtype: torch.dtype, A: int, E: int) -> Tiles:
    """Return the tiles for a call, from a fixed table by dtype and the mean number of an expert's rows."""
    mean = A / max(1, min(A, E))
    if dtype == torch.float32:
        rows = 16 if mean <= 16 else 32 if mean <= 32 else 64
        return Tiles(rows, 64, 32, 32, 4, 2, (64, 64), 4)
    if mean <= 32:
        return Tiles(16 if mean <= 16 else 32, 64, 64, 64, 4, 3, (128, 128), 8)
    return Tiles(64 if mean <= 64 else 128, 128, 64, 64, 8, 3, (128, 128), 8)


class Run:
    """One call: its sorted assignments, cut into tiles of rows of one expert."""

    def __init__(self, x: Tensor, w1: Tensor, experts: Tensor) -> None:
        (self.M, self.D), (self.E, self.F, _) = x.shape, w1.shape
        self.slots, self.A = experts.shape[1], experts.numel()
        self.tiles = tiles(x.dtype, self.A, self.E)
        self.wide = x.dtype == torch.float32
        self.x = x
        runs = sort_by_expert(experts, self.E)
        self.order, size = runs.order, self.tiles.rows
        # [E + 1] each: an expert's first sorted row, and first tile.
        self.starts = torch.nn.functional.pad(runs.ends, (1, 0))
        counts = (self.starts.diff() + size - 1) // size
        self.first = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        # A tile has a row at least, and but for the last of each expert all of them.
        self.count = min(self.A, self.A // size + self.E)
        numbers = torch.arange(self.count, device=x.device, dtype=torch.int32)
        # [count]: each tile's expert, E behind the last tile.
        self.owner = torch.searchsorted(self.first[1:], numbers, right=True, out_int32=True)

    def room(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return uninitialised memory."""
        return torch.empty(shape, dtype=dtype or self.x.dtype, device=self.x.device)

    def over_tiles(
        self, kernel: Any, width: int, block: int, inputs: tuple[Any, ...], outputs: tuple[Any, ...], **more: Any
    ) -> None:
        """Launch a kernel that writes `width` columns of every tile, `block` at a time."""
        t, block = self.tiles, min(block, padded(width))
        start(
            *(kernel, self.count * -(-width // block)),
            *(*inputs, self.order, self.starts, self.first, self.owner, *outputs),
            D=self.D,
            F=self.F,
            BM=t.rows,
            BN=block,
            BK=min(t.depth, padded(max(self.D, self.F))),
            WIDE=self.wide,
            num_warps=t.warps,
            num_stages=t.stages,
            **more,
        )

    def combine(self, y: Tensor, weights: Tensor | None) -> Tensor:
        """Sum the assignments' rows [A, D] over each token's slots."""
        o = self.room(self.M, self.D)
        block = min(1024, padded(self.D))
        start(
            *(kernels.combine_kernel, self.M * -(-self.D // block)),
            *(y, weights, o, self.slots),
            D=self.D,
            BN=block,
            WEIGHED=weights is not None,
            num_warps=4,
        )
        return o

    def matrix_gradient(self, left: Tensor, right: Tensor, left_tokens: bool, right_tokens: bool) -> Tensor:
        """Return left^T right over each expert's rows, [E, columns of left, columns of right]."""
        t, (height, width) = self.tiles, (left.shape[1], right.shape[1])
        BM, BN = min(t.square[0], padded(height)), min(t.square[1], padded(width))
        d_w = self.room(self.E, height, width)
        start(
            *(kernels.matrix_backward_kernel, self.E * -(-height // BM) * -(-width // BN)),
            *(left, right, self.order, self.starts, d_w, self.slots),
            HEIGHT=height,
            WIDTH=width,
            BM=BM,
            BN=BN,
            BK=min(t.depth, 32),
            LEFT_TOKENS=left_tokens,
            RIGHT_TOKENS=right_tokens,
            WIDE=self.wide,
            num_warps=t.square_warps,
            num_stages=t.stages,
        )
        return d_w


def forward(
    x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, weights: Tensor, experts: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (o, h1, h3) of contiguous tensors, h1 and h3 [A, F] in sorted order, empty unless `keep`."""
    run = Run(x, w1, experts)
    a, y = run.room(run.A, run.F), run.room(run.A, run.D)
    h1, h3 = (run.room(run.A if keep else 0, run.F) for _ in range(2))
    columns, outputs = run.tiles.columns, (a, h1, h3, run.E, run.slots)
    run.over_tiles(kernels.gate_up_kernel, run.F, columns, (x, w1, w3), outputs, KEEP=keep)
    run.over_tiles(kernels.down_kernel, run.D, columns, (a, w2), (y, run.E))
    return run.combine(y, weights), h1, h3


def backward(
    d_o: Tensor,
    x: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    weights: Tensor,
    experts: Tensor,
    h1: Tensor,
    h3: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, w1, w3, w2 and weights."""
    run = Run(x, w1, experts)
    weighed, d_h1, d_h3 = (run.room(run.A, run.F) for _ in range(3))
    columns = min(run.tiles.gradient_columns, padded(run.F))
    parts = run.room(-(-run.F // columns), run.A, dtype=torch.float32)
    outputs = (weighed, d_h1, d_h3, parts, run.E, run.slots, run.A)
    run.over_tiles(kernels.activation_backward_kernel, run.F, columns, (d_o, w2, weights, h1, h3), outputs)
    d_rows = run.room(run.A, run.D)
    run.over_tiles(kernels.token_backward_kernel, run.D, run.tiles.columns, (d_h1, d_h3, w1, w3), (d_rows, run.E))
    d_w1, d_w3 = (run.matrix_gradient(d_h, x, False, True) for d_h in (d_h1, d_h3))
    d_w2 = run.matrix_gradient(d_o, weighed, True, False)
    d_weights = parts.sum(0).view(weights.shape).to(weights.dtype)
    return run.combine(d_rows, None), d_w1, d_w3, d_w2, d_weights
