"""The norms' kernels: whole rows in registers, so that memory is read once. Equations as in norm/reference.py.

One set of kernels computes all three: TERMS is what the sum of squares is divided by, WEIGHT whether there is one,
ROUND whether r x is rounded to the dtype of x before it, GATE what is applied to the gate.
"""

import triton
import triton.language as tl

from kimi_linear.ops.triton.device import narrow, save

NO_GATE: tl.constexpr = tl.constexpr(0)
SIGMOID: tl.constexpr = tl.constexpr(1)
SILU: tl.constexpr = tl.constexpr(2)


@triton.jit
def load_rows(x, rows, stride, c, inside):
    """Return channels c of rows of x as float32, zero outside."""
    return tl.load(x + rows[:, None] * stride + c[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_weight(weight, c, D: tl.constexpr, WEIGHT: tl.constexpr):
    """Return channels c of the weight as a row of float32; 1 without one."""
    w = 1.0
    if WEIGHT:
        w = tl.load(weight + c, mask=c < D, other=0.0).to(tl.float32)[None, :]
    return w


@triton.jit
def activation(gate, rows, stride, c, inside, GATE: tl.constexpr):
    """Return act(g) and act'(g) of rows of the gate; 1 and 0 without one."""
    act, slope = 1.0, 0.0
    if GATE != NO_GATE:
        g = load_rows(gate, rows, stride, c, inside)
        act = tl.sigmoid(g)
        slope = act * (1.0 - act)
        if GATE == SILU:
            act, slope = g * act, act + g * slope
    return act, slope


@triton.jit
def rounded(n, dtype: tl.constexpr, ROUND: tl.constexpr):
    """Return n as the weight meets it."""
    if ROUND:
        n = narrow(n, dtype).to(tl.float32)
    return n


@triton.jit(do_not_specialize=["M", "eps"])
def forward_kernel(
    x, gate, weight, y,
    M, eps, x_stride, gate_stride,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
    TERMS: tl.constexpr, WEIGHT: tl.constexpr, ROUND: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Write y of ROWS rows. Grid: tiles of rows."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, DP)
    inside = (rows < M)[:, None] & (c < D)[None, :]
    n = load_rows(x, rows, x_stride, c, inside)
    w = load_weight(weight, c, D, WEIGHT)
    act, _ = activation(gate, rows, gate_stride, c, inside, GATE)
    n *= tl.rsqrt(tl.sum(n * n, 1) / TERMS + eps)[:, None]
    save(y + rows[:, None] * D + c[None, :], rounded(n, x.dtype.element_ty, ROUND) * w * act, inside)


@triton.jit(do_not_specialize=["M", "TILES", "eps"])
def backward_kernel(
    d_y, x, gate, weight, d_x, d_gate, d_weight,
    M, TILES, eps, d_stride, x_stride, gate_stride,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
    TERMS: tl.constexpr, WEIGHT: tl.constexpr, ROUND: tl.constexpr, GATE: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """dx = r (dn - n (dn . n) / TERMS), and dgate, of TILES times ROWS rows; of dweight the program's share [D].

    r is computed again. HOLD keeps the weight in registers. Grid: as many programs as `d_weight` has rows.
    """
    program = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, DP)
    total = tl.zeros([ROWS, DP], tl.float32)
    if HOLD:
        held = load_weight(weight, c, D, WEIGHT)
    for tile in range(TILES):
        rows = (program * TILES + tile) * ROWS + tl.arange(0, ROWS)
        inside = (rows < M)[:, None] & (c < D)[None, :]
        at = rows[:, None] * D + c[None, :]
        n = load_rows(x, rows, x_stride, c, inside)
        d_n = load_rows(d_y, rows, d_stride, c, inside)
        act, slope = activation(gate, rows, gate_stride, c, inside, GATE)
        r = tl.rsqrt(tl.sum(n * n, 1) / TERMS + eps)[:, None]
        n *= r
        if HOLD:
            w = held
        else:
            w = load_weight(weight, c, D, WEIGHT)
        if GATE != NO_GATE:
            save(d_gate + at, d_n * n * w * slope, inside)
        d_n *= act
        if WEIGHT:
            total += d_n * rounded(n, x.dtype.element_ty, ROUND)
        d_n *= w
        along = tl.sum(d_n * n, 1)[:, None] / TERMS
        save(d_x + at, (d_n - n * along) * r, inside)
    if WEIGHT:
        tl.store(d_weight + program * D + c, tl.sum(total, 0), mask=c < D)


@triton.jit(do_not_specialize=["M", "eps"])
def wide_backward_kernel(
    d_y, x, gate, weight, d_x, d_gate, d_weight,
    M, eps, d_stride, x_stride, gate_stride,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    TERMS: tl.constexpr, WEIGHT: tl.constexpr, ROUND: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Do the same for rows that do not fit registers: twice over the channels, the second time from the cache.

    Grid: tiles of rows, as many as `d_weight` has rows.
    """
    program = tl.program_id(0).to(tl.int64)
    rows = program * ROWS + tl.arange(0, ROWS)
    squares, products = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for first in range(0, D, BLOCK):
        c = first + tl.arange(0, BLOCK)
        inside = (rows < M)[:, None] & (c < D)[None, :]
        value = load_rows(x, rows, x_stride, c, inside)
        d_n = load_rows(d_y, rows, d_stride, c, inside)
        act, _ = activation(gate, rows, gate_stride, c, inside, GATE)
        d_n *= act * load_weight(weight, c, D, WEIGHT)
        squares += tl.sum(value * value, 1)
        products += tl.sum(d_n * value, 1)
    r = tl.rsqrt(squares / TERMS + eps)[:, None]
    along = products[:, None] * r / TERMS
    for first in range(0, D, BLOCK):
        c = first + tl.arange(0, BLOCK)
        inside = (rows < M)[:, None] & (c < D)[None, :]
        at = rows[:, None] * D + c[None, :]
        n = load_rows(x, rows, x_stride, c, inside) * r
        d_n = load_rows(d_y, rows, d_stride, c, inside)
        act, slope = activation(gate, rows, gate_stride, c, inside, GATE)
        w = load_weight(weight, c, D, WEIGHT)
        if GATE != NO_GATE:
            save(d_gate + at, d_n * n * w * slope, inside)
        d_n *= act
        if WEIGHT:
            total = tl.sum(d_n * rounded(n, x.dtype.element_ty, ROUND), 0)
            tl.store(d_weight + program * D + c, total, mask=c < D)
        save(d_x + at, (d_n * w - n * along) * r, inside)
