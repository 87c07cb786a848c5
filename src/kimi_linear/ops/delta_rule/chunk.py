"""The chunked form in plain PyTorch, on any device, with its own backward in the short form.

With S the state entering a chunk and the factors of `scores.py` (q~ = q exp(G), e~ = e exp(G'), k^ = k exp(G_C - G)):

    R  = M (z - e~ S)                  what is written, row by row
    O  = scale (q~ S + P R)
    S' = Diag(exp G_C) S + k^T R

and backward, given dO (times scale) and dS', nothing but products of these:

    dR = P^T dO + k^ dS'        dz = M^T dR        dP = tril(dO R^T)        dL = -stril(dz R^T)
    dq~ = dO S^T                de~ = -dz S^T      dk^ = R dS'^T
    dS = q~^T dO + Diag(exp G_C) dS' - e~^T dz

The decay gradient is the reverse running sum of q dq - k dk + e de, plus exp(G_C) sum_v(S dS') + sum_s k^ dk^ at the
last row. The backward keeps nothing of the forward but its inputs: it sweeps forward once for the states at the tiles'
starts, then visits the tiles from the last.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kimi_linear.ops.autocast import without_autocast
from kimi_linear.ops.delta_rule.autograd import register
from kimi_linear.ops.delta_rule.layout import (
    Group,
    Tile,
    chunk_length,
    expand_heads,
    plan_dense,
    plan_packed,
    read_cu_seqlens,
    sum_heads,
    wide_dtype,
)
from kimi_linear.ops.delta_rule.scores import (
    Scores,
    Terms,
    channel_scores,
    channel_scores_backward,
    scalar_scores,
    scalar_scores_backward,
)

CHUNK = 32
# Elements of one factor (rows x chunk x channels) a tile holds: large enough to hide the cost of a call, small enough
# for the cache.
TILE_ELEMENTS = 32 * 32 * 128
# Rows (sequence x head) whose products run together at least, where there are as many.
WAVE_ROWS = 8


class Source(Protocol):
    """Where a tile's terms come from and where its gradients go."""

    value: Tensor
    key_dim: int

    def load(self, tile: Tile) -> Terms:
        """Return the tile's terms, heads expanded, wide, rows past the end of a sequence neutral."""

    def store(self, tile: Tile, terms: Terms, gradients: Terms) -> None:
        """Take the gradients of what `load` returned."""


@dataclass(frozen=True)
class Settings:
    """What does not change from tile to tile."""

    scale: float
    read: str
    scalar: bool

    @property
    def prepare(self) -> Callable[..., Scores]:
        """The preparation for this kind of decay."""
        return scalar_scores if self.scalar else channel_scores

    @property
    def prepare_backward(self) -> Callable[..., Terms]:
        """Its backward."""
        return scalar_scores_backward if self.scalar else channel_scores_backward


def plan(source: Source, cu_seqlens: Tensor | None) -> Iterable[Group]:
    """Cut the tokens of a source into groups and tiles."""
    value = source.value
    B, T, HV, V = value.shape
    # Where channels are few, the scores [C, C] are the largest factor.
    tokens = TILE_ELEMENTS // (max(source.key_dim, V, CHUNK) * HV)
    least = -(-WAVE_ROWS // HV)
    if cu_seqlens is not None:
        return plan_packed(read_cu_seqlens(cu_seqlens, T), CHUNK, tokens, least, value.device)
    chunk = chunk_length(T, CHUNK)
    return plan_dense(B, T, chunk, max(1, tokens // chunk), least)


def _waves(tile: Tile, heads: int) -> list[slice]:
    """Return the rows of each wave of a tile."""
    slices, start = [], 0
    for active in tile.waves:
        slices.append(slice(start * heads, (start + active) * heads))
        start += active
    return slices


def _written(scores: Scores, rows: slice, z: Tensor, read_out: Tensor) -> Tensor:
    """Return R = M (z - e~ S) for one wave; read_out [r, C, X, V] holds the products with S."""
    if scores.inverse is None:
        return z[rows]
    return torch.bmm(scores.inverse[rows], z[rows] - read_out[:, :, 1])


def _carry(state: Tensor, scores: Scores, rows: slice, written: Tensor) -> None:
    """Advance the states [r, K, V] of one wave in place: S <- Diag(exp G_C) S + k^T R."""
    state.mul_(scores.total[rows].unsqueeze(-1))
    state.baddbmm_(scores.keys[rows].transpose(1, 2), written)


def _chain(terms: Terms, scores: Scores, state: Tensor, waves: list[slice], scale: float) -> Tensor:
    """Run the waves of a tile one after the other; updates `state` [n, HV, K, V] in place, returns o [R, C, V]."""
    _, C, X, K = scores.queries.shape
    heads, V = state.shape[1], state.shape[3]
    output = torch.empty_like(terms.z)
    for rows in waves:
        active = state[: (rows.stop - rows.start) // heads].view(-1, K, V)
        read_out = torch.bmm(scores.queries[rows].view(-1, C * X, K), active).view(-1, C, X, V)
        written = _written(scores, rows, terms.z, read_out)
        torch.baddbmm(read_out[:, :, 0], scores.blocks[rows, :, 0], written, out=output[rows])
        _carry(active, scores, rows, written)
    return output.mul_(scale)


def _group_state(initial: Tensor | None, group: Group, n: int, source: Source) -> Tensor:
    """Return a fresh copy of the group's initial states, [n, HV, K, V], wide."""
    value = source.value
    dtype = wide_dtype(value.dtype)
    if initial is None:
        return torch.zeros(n, value.shape[2], source.key_dim, value.shape[3], dtype=dtype, device=value.device)
    return initial[group.sequences].to(dtype, copy=True, memory_format=torch.contiguous_format)


def _size(group: Group) -> int:
    sequences = group.sequences
    return sequences.stop - sequences.start if isinstance(sequences, slice) else len(sequences)


def chunk_forward(
    source: Source, settings: Settings, initial: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return o [B, T, HV, V] and the final states [N, HV, K, V]."""
    value = source.value
    B, _, HV, V = value.shape
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    o = torch.empty_like(value, memory_format=torch.contiguous_format)
    final = torch.zeros(N, HV, source.key_dim, V, dtype=wide_dtype(value.dtype), device=value.device)
    if initial is not None:
        # Sequences without tokens end as they began.
        final.copy_(initial)
    for group in plan(source, cu_seqlens):
        state = _group_state(initial, group, _size(group), source)
        for tile in group.tiles:
            terms = source.load(tile)
            scores = settings.prepare(terms, settings.read, keep=False)
            output = _chain(terms, scores, state, _waves(tile, HV), settings.scale)
            tile.store(o, output.unflatten(0, (-1, HV)))
        final[group.sequences] = state
    return o, final


def _tile_starts(source: Source, settings: Settings, state: Tensor, group: Group) -> list[Tensor]:
    """Return the states [n, HV, K, V] entering each tile of a group; `state` enters the first."""
    starts = [state]
    for tile in group.tiles[:-1]:
        terms = source.load(tile)
        scores = settings.prepare(terms, settings.read, keep=False)
        state = state.clone()
        _chain(terms, scores, state, _waves(tile, state.shape[1]), settings.scale)
        starts.append(state)
    return starts


def _recompute(terms: Terms, scores: Scores, state: Tensor, waves: list[slice]) -> tuple[Tensor, list[Tensor]]:
    """Return what every row wrote, [R, C, V], and the states [r, K, V] entering every wave."""
    _, C, X, K = scores.queries.shape
    heads, V = state.shape[1], state.shape[3]
    written, entering = torch.empty_like(terms.z), []
    for rows in waves:
        active = state[: (rows.stop - rows.start) // heads].view(-1, K, V)
        entering.append(active.clone())
        read_out = torch.bmm(scores.queries[rows].view(-1, C * X, K), active).view(-1, C, X, V)
        written[rows] = _written(scores, rows, terms.z, read_out)
        _carry(active, scores, rows, written[rows])
    return written, entering


def _tile_backward(
    terms: Terms, settings: Settings, state: Tensor, d_state: Tensor, d_o: Tensor, waves: list[slice]
) -> Terms:
    """Return the gradients of a tile's terms; updates `d_state` [n, HV, K, V] in place. `state` is overwritten."""
    scores = settings.prepare(terms, settings.read, keep=True)
    written, entering = _recompute(terms, scores, state, waves)
    R, C, X, K = scores.queries.shape
    heads, V = state.shape[1], state.shape[3]
    # dO and -dz, interleaved as the queries are.
    d_read = torch.empty(R, C, X, V, dtype=d_o.dtype, device=d_o.device)
    d_read[:, :, 0] = d_o
    d_queries, d_keys = torch.empty_like(scores.queries), torch.empty_like(scores.keys)
    d_z = torch.empty_like(terms.z)
    tail = torch.empty(R, K, dtype=d_o.dtype, device=d_o.device)
    for rows in reversed(waves):
        before = entering.pop()
        d_active = d_state[: (rows.stop - rows.start) // heads].view(-1, K, V)
        d_written = torch.bmm(scores.keys[rows], d_active)
        d_written.baddbmm_(scores.blocks[rows, :, 0].transpose(1, 2), d_o[rows])
        if scores.inverse is not None:
            d_written = torch.bmm(scores.inverse[rows].transpose(1, 2), d_written)
            torch.neg(d_written, out=d_read[rows, :, 1])
        d_z[rows] = d_written
        both = d_read[rows].view(-1, C * X, V)
        torch.bmm(both, before.transpose(1, 2), out=d_queries[rows].view(-1, C * X, K))
        torch.bmm(written[rows], d_active.transpose(1, 2), out=d_keys[rows])
        d_active.mul_(scores.total[rows].unsqueeze(-1))
        tail[rows] = torch.linalg.vecdot(before, d_active)
        d_active.baddbmm_(scores.queries[rows].view(-1, C * X, K).transpose(1, 2), both)
    d_blocks = torch.bmm(d_read.view(R, C * X, V), written.transpose(1, 2)).view(R, C, X, C)
    del d_read, written, both
    gradients = settings.prepare_backward(terms, scores, d_queries, d_keys, d_blocks, tail, settings.read)
    gradients.z = d_z
    return gradients


def chunk_backward(
    source: Source,
    settings: Settings,
    d_o: Tensor,
    d_final: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Hand every tile's gradients to `source.store`; return the gradient of the initial states [N, HV, K, V]."""
    value = source.value
    dtype, HV = wide_dtype(value.dtype), value.shape[2]
    # Sequences without tokens pass their gradient through.
    d_initial = d_final.to(dtype, copy=True, memory_format=torch.contiguous_format)
    for group in plan(source, cu_seqlens):
        d_state = d_initial[group.sequences].clone()
        starts = _tile_starts(source, settings, _group_state(initial, group, _size(group), source), group)
        for tile in reversed(group.tiles):
            terms = source.load(tile)
            d_output = tile.load(d_o, dtype).flatten(0, 1).mul_(settings.scale)
            gradients = _tile_backward(terms, settings, starts.pop(), d_state, d_output, _waves(tile, HV))
            source.store(tile, terms, gradients)
        d_initial[group.sequences] = d_state
    return d_initial


class PlainSource:
    """The five inputs as they are, [B, T, heads, dim]."""

    def __init__(self, q: Tensor, k: Tensor, e: Tensor | None, z: Tensor, g: Tensor) -> None:
        self.q, self.k, self.e, self.value = q, k, e, z
        self.g = g if g.dim() == 4 else g.unsqueeze(-1)
        self.key_dim = q.shape[-1]
        self.dtype = wide_dtype(z.dtype)
        self.gradients: list[Tensor | None] = []

    def allocate(self) -> None:
        """Allocate the gradients: (q, k, e, z, g), contiguous, in the inputs' dtypes."""
        inputs = (self.q, self.k, self.e, self.value, self.g)
        self.gradients = [
            None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs
        ]

    def load(self, tile: Tile) -> Terms:
        """Return the tile's terms."""
        heads = self.value.shape[2]
        q, k, e = (
            None if x is None else expand_heads(tile.load(x, self.dtype), heads, 1).flatten(0, 1)
            for x in (self.q, self.k, self.e)
        )
        z, g = (tile.load(x, self.dtype).flatten(0, 1) for x in (self.value, self.g))
        assert q is not None
        assert k is not None
        return Terms(q, k, e, z, g)

    def store(self, tile: Tile, terms: Terms, gradients: Terms) -> None:
        """Write the tile's gradients, value heads summed into their key heads."""
        heads = self.value.shape[2]
        found = (gradients.q, gradients.k, gradients.e, gradients.z, gradients.g)
        for target, gradient in zip(self.gradients, found, strict=True):
            if target is not None and gradient is not None:
                tile.store(target, sum_heads(gradient.unflatten(0, (-1, heads)), target.shape[2], 1))


@torch.library.custom_op("kimi_linear::delta_rule_chunk", mutates_args=())
def delta_rule_chunk(
    q: Tensor,
    k: Tensor,
    erase_key: Tensor | None,
    write_value: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    read: str,
) -> tuple[Tensor, Tensor]:
    """Run the chunked form; see `kimi_linear.ops.delta_rule.delta_rule` for the arguments."""
    source = PlainSource(q, k, erase_key, write_value, log_decay)
    with without_autocast(q.device):
        return chunk_forward(source, Settings(scale, read, log_decay.dim() == 3), initial_state, cu_seqlens)


@torch.library.custom_op("kimi_linear::delta_rule_chunk_backward", mutates_args=())
def delta_rule_chunk_backward(
    d_o: Tensor,
    d_final: Tensor,
    q: Tensor,
    k: Tensor,
    erase_key: Tensor | None,
    write_value: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    read: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of (q, k, erase_key or empty, write_value, log_decay, initial state)."""
    source = PlainSource(q, k, erase_key, write_value, log_decay)
    source.allocate()
    settings = Settings(scale, read, log_decay.dim() == 3)
    with without_autocast(q.device):
        d_initial = chunk_backward(source, settings, d_o, d_final, initial_state, cu_seqlens)
    d_q, d_k, d_e, d_z, d_g = source.gradients
    assert d_q is not None
    assert d_k is not None
    assert d_z is not None
    assert d_g is not None
    return d_q, d_k, q.new_empty(0) if d_e is None else d_e, d_z, d_g.view_as(log_decay), d_initial


register(delta_rule_chunk, delta_rule_chunk_backward)
