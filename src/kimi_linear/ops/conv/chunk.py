"""The short convolution in tiles of rows: temporaries stay in the cache, and nothing of size [T, D] but the results.

Equations and layout are those of the reference. A tile is a range of rows [r0, r1) of the segments; `_Source` hands
out the rows of a tile in the compute dtype: as a view of x where the range holds tokens only and needs no cast,
otherwise gathered into scratch memory with the histories in their places.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.ops.checks import compute_dtype
from kimi_linear.ops.conv import autograd
from kimi_linear.ops.conv.layout import Layout, rows_to_state, segments, state_to_rows

# Elements of a tile: a few float32 tiles of this size fit the second-level cache of a core.
_TILE_ELEMENTS = 1 << 17


class _Rows:
    """How many rows of one ascending list lie before a row: one device read for all tile edges of a call."""

    def __init__(self, rows: Tensor, edges: list[int]) -> None:
        self.rows = rows
        counts = torch.searchsorted(rows, torch.tensor(edges, device=rows.device)).tolist()
        self._before = dict(zip(edges, counts, strict=True))

    def between(self, start: int, stop: int) -> slice:
        """Return which entries of the list lie in rows [start, stop)."""
        return slice(self._before[start], self._before[stop])


class _Tiles:
    """The tiles of a layout, and for each edge where it cuts the tokens, the histories and the final states."""

    def __init__(self, layout: Layout, features: int) -> None:
        self.layout = layout
        past = layout.width - 1
        height = max(_TILE_ELEMENTS // max(features, 1), 2 * layout.width)
        self.height = height
        self.ranges = [(row, min(row + height, layout.rows)) for row in range(0, layout.rows, height)]
        starts = {max(row - past, 0) for row, _ in self.ranges}
        stops = {min(row + past, layout.rows) for _, row in self.ranges}
        edges = sorted(starts | stops | {0, layout.rows} | {row for row, _ in self.ranges})
        self.tokens = _Rows(layout.tokens, edges)
        self.history = _Rows(layout.history, edges)
        self.final = _Rows(layout.final, edges)


class _Source:
    """Rows of the segments from tokens [B * T, D] and histories [N * (W - 1), D], zeros where there is none."""

    def __init__(self, tokens: Tensor, history: Tensor | None, tiles: _Tiles, dtype: torch.dtype) -> None:
        self._tokens, self._history, self._tiles = tokens, history, tiles
        extra = 3 * (tiles.layout.width - 1)
        self._scratch = tokens.new_empty(tiles.height + extra, tokens.shape[1], dtype=dtype)

    def read(self, start: int, stop: int) -> Tensor:
        """Return rows [start, stop), valid until the next read; rows outside the segments are zero."""
        first, last = max(start, 0), min(stop, self._tiles.layout.rows)
        tokens = self._tiles.tokens.between(first, last)
        inside = (first, last) == (start, stop) and tokens.stop - tokens.start == last - first
        if inside and self._tokens.dtype == self._scratch.dtype:
            return self._tokens[tokens]
        window = self._scratch[: stop - start]
        if inside:
            return window.copy_(self._tokens[tokens])
        window.zero_()
        window.index_copy_(0, self._tiles.tokens.rows[tokens] - start, self._tokens[tokens].to(window.dtype))
        if self._history is not None:
            history = self._tiles.history.between(first, last)
            rows = self._tiles.history.rows[history] - start
            window.index_copy_(0, rows, self._history[history].to(window.dtype))
        return window


def _correlate(window: Tensor, taps: Tensor, out: Tensor) -> Tensor:
    # Eq. 2: window [n + W - 1, D], taps [W, D], out [n, D].
    n = out.shape[0]
    torch.mul(window[:n], taps[0], out=out)
    for tap in range(1, taps.shape[0]):
        out.addcmul_(window[tap : tap + n], taps[tap])
    return out


def _scatter(rows: Tensor, source: Tensor, part: slice, start: int, out: Tensor) -> None:
    # Entries `part` of out <- the rows of the tile that hold them. `source` is [n, D], its first row `start`.
    if part.stop - part.start == source.shape[0]:
        out[part] = source
    elif part.stop > part.start:
        out[part] = source.index_select(0, rows[part] - start)


@torch.library.custom_op("kimi_linear::short_conv_chunk", mutates_args=())
def short_conv_chunk(
    x: Tensor, weight: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """Return y [B, T, D] and the final state [N, D, W - 1]."""
    layout = segments(x.shape[0], x.shape[1], cu_seqlens, weight.shape[1], x.device)
    dtype = compute_dtype(x)
    tokens = x.reshape(-1, x.shape[2])
    history = None if initial_state is None else state_to_rows(initial_state).to(x.dtype)
    tiles = _Tiles(layout, x.shape[2])
    source = _Source(tokens, history, tiles, dtype)
    taps = weight.t().to(dtype).contiguous()
    scratch = x.new_empty(tiles.height, x.shape[2], dtype=dtype)
    y = x.new_empty(x.shape)
    flat = y.view(-1, x.shape[2])
    for r0, r1 in tiles.ranges:
        part = tiles.tokens.between(r0, r1)
        whole = part.stop - part.start == r1 - r0 and x.dtype == dtype
        pre = _correlate(source.read(r0 - layout.width + 1, r1), taps, flat[part] if whole else scratch[: r1 - r0])
        if silu:
            F.silu(pre, inplace=True)
        if not whole:
            _scatter(layout.tokens, pre, part, r0, flat)
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return y, rows_to_state(_final_rows(tokens, history, layout), sequences, layout)


def _final_rows(tokens: Tensor, history: Tensor | None, layout: Layout) -> Tensor:
    # Eq. 4: a final row is a token, or for sequences shorter than W - 1 a history row. [N * (W - 1), D]
    if layout.tokens.shape[0] == 0:
        return tokens.new_zeros(layout.final.shape[0], tokens.shape[1]) if history is None else history.clone()
    at = torch.searchsorted(layout.tokens, layout.final).clamp_(max=layout.tokens.shape[0] - 1)
    rows = tokens.index_select(0, at)
    old = (layout.tokens[at] != layout.final).nonzero().squeeze(1)
    if history is None:
        return rows.index_fill_(0, old, 0)
    return rows.index_copy_(0, old, history.index_select(0, torch.searchsorted(layout.history, layout.final[old])))


@torch.library.custom_op("kimi_linear::short_conv_chunk_backward", mutates_args=())
def short_conv_chunk_backward(
    grad_y: Tensor,
    grad_final: Tensor,
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and initial_state; the pre-activation is computed again, tile by tile."""
    layout = segments(x.shape[0], x.shape[1], cu_seqlens, weight.shape[1], x.device)
    dtype, past, features = compute_dtype(x), weight.shape[1] - 1, x.shape[2]
    tiles = _Tiles(layout, features)
    history = None if initial_state is None else state_to_rows(initial_state).to(x.dtype)
    inputs = _Source(x.reshape(-1, features), history, tiles, dtype)
    outputs = _Source(grad_y.reshape(-1, features), None, tiles, dtype)
    final = state_to_rows(grad_final).to(dtype)
    taps = weight.t().to(dtype).contiguous()
    reversed_taps = taps.flip(0)
    # Rows after the tile read the tile's rows, so each tile forms W - 1 rows more of the pre-activation's gradient.
    pre, product = (x.new_empty(tiles.height + past, features, dtype=dtype) for _ in range(2))
    grad_taps = torch.zeros_like(taps)
    grad_tokens = x.new_empty(x.shape).view(-1, features)
    grad_history = None if history is None else torch.empty_like(history)
    for r0, r1 in tiles.ranges:
        n = r1 - r0
        window = inputs.read(r0 - past, r1 + past)
        grad_pre = outputs.read(r0, r1 + past)
        if silu:
            z = _correlate(window, taps, pre[: n + past])
            grad_pre = torch.ops.aten.silu_backward.grad_input(grad_pre, z, grad_input=z)
        for tap in range(past + 1):
            grad_taps[tap] += torch.mul(grad_pre[:n], window[tap : tap + n], out=product[:n]).sum(0)
        # Row r feeds pre-activations r .. r + W - 1 through taps W - 1 .. 0.
        grad_rows = _correlate(grad_pre, reversed_taps, product[:n])
        ends = tiles.final.between(r0, r1)
        if ends.stop > ends.start:
            grad_rows.index_add_(0, layout.final[ends] - r0, final[ends])
        _scatter(layout.tokens, grad_rows, tiles.tokens.between(r0, r1), r0, grad_tokens)
        if grad_history is not None:
            _scatter(layout.history, grad_rows, tiles.history.between(r0, r1), r0, grad_history)
    grad_x, grad_weight = grad_tokens.view(x.shape), grad_taps.t().to(weight.dtype).contiguous()
    if initial_state is None or grad_history is None:
        return grad_x, grad_weight, x.new_empty(0)
    return grad_x, grad_weight, rows_to_state(grad_history.to(initial_state.dtype), initial_state.shape[0], layout)


autograd.register(short_conv_chunk, short_conv_chunk_backward)
