"""Inside one chunk: causal scores with decay, the triangular inverse, and the way back.

For rows r, s of a chunk (Kimi Linear, arXiv:2510.26692, Eqs. 6-9, with erase key e apart from key k):

    P_rs = sum_c q_rc k_sc exp(G_rc - G_sc)    r >= s      causal scores
    L_rs = sum_c e_rc k_sc exp(G'_rc - G_sc)   r > s       what row r erases of row s
    M    = (I + L)^-1

G is the running sum of the log decay inside the chunk, G' = G (read after the decay) or G without row r's own decay
(read before it). The decays of a whole chunk span far more than a float's range, so no exp(G) is ever divided by
another. Instead blocks are joined two by two: at block length b every key holds its decay to the *end* of its block,
every query its decay from the *start* of its block, and the scores of (second half) x (first half) of each pair of
blocks are one plain product. Then both are carried on to the pair: queries of the second half take the first block's
whole decay, keys of the first half the second block's. Every factor is a product of exp(g) <= 1, formed with one exp an
element in all; nothing overflows, nothing cancels, underflow is the right answer. After log2(C) joins the factors are
exactly those the state needs: q exp(G), e exp(G'), k exp(G_C - G).

A scalar decay leaves the sum over c free of it: the scores are one product times exp(G_r - G_s), summed by segments.

Letters: R rows of chunks (chunk x head), C chunk, X streams: the query and, where something is erased, the erase key.
Query and erase key are interleaved by token, [R, C, X, K], so that one product serves both.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# exp(g) is below the rounding error of float64 from here on.
FORGOTTEN = -40.0


@dataclass
class Terms:
    """One tile of the five inputs, wide: q, k, e [R, C, K], z [R, C, V], g [R, C, K] or, scalar, [R, C, 1]."""

    q: Tensor
    k: Tensor
    e: Tensor | None
    z: Tensor
    g: Tensor


@dataclass
class Scores:
    """What the chain over chunks needs of a tile, and what the backward needs of the preparation."""

    # q exp(G) and e exp(G'), [R, C, X, K].
    queries: Tensor
    # k exp(G_C - G), [R, C, K].
    keys: Tensor
    # exp(G_C), [R, K], or [R, 1] for a scalar decay.
    total: Tensor
    # P and L, interleaved by row, [R, C, X, C].
    blocks: Tensor
    # (I + L)^-1, [R, C, C]; None where nothing is erased.
    inverse: Tensor | None
    # Per join: (queries of second halves, keys of first halves, both blocks' decay), before they are carried on.
    joins: list[tuple[Tensor, Tensor, Tensor]]


def unit_lower_inverse(L: Tensor) -> Tensor:
    """Return (I + L)^-1 for strictly lower L [R, C, C], C a power of two, by joining inverses of halves.

    [[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]]: as stable as forward substitution, all rows of all chunks
    at once. No power of L is ever formed.
    """
    R, C, _ = L.shape
    inverse = torch.zeros(R, C, C, dtype=L.dtype, device=L.device)
    inverse.diagonal(dim1=1, dim2=2).fill_(1)
    b = 1
    while b < C:
        corner = _corners(L, b)
        if b > 1:
            left = _diagonal_blocks(inverse, b, second=True)
            right = _diagonal_blocks(inverse, b, second=False)
            corner = torch.bmm(torch.bmm(left, corner), right)
        # `corner` may still be a view of L, so the sign is changed in the copy.
        _corner_view(inverse, b, 1).copy_(corner.view(R, -1, b, b)).neg_()
        b *= 2
    return inverse


def _corner_view(x: Tensor, b: int, streams: int) -> Tensor:
    """View [R, C * X, C] at the lower left corner of each pair of blocks: [R, C / 2b, b X, b]."""
    R, rows, C = x.shape
    step = rows * C
    return (
        x.as_strided(
            (R, C // (2 * b), b * streams, b),
            (x.stride(0), 2 * b * (streams * x.stride(1) + x.stride(2)), x.stride(1), x.stride(2)),
            x.storage_offset() + b * streams * x.stride(1),
        )
        if step
        else x.new_empty(R, 0, b * streams, b)
    )


def _corners(x: Tensor, b: int, streams: int = 1) -> Tensor:
    """Copy the corners of `_corner_view` as a batch [R C / 2b, b X, b]."""
    return _corner_view(x, b, streams).reshape(-1, b * streams, b).contiguous()


def _diagonal_blocks(x: Tensor, b: int, *, second: bool) -> Tensor:
    """Copy the first or second diagonal b-block of every pair, [R C / 2b, b, b]."""
    R, C, _ = x.shape
    offset = b * (C + 1) if second else 0
    view = x.as_strided((R, C // (2 * b), b, b), (C * C, 2 * b * (C + 1), C, 1), offset)
    return view.reshape(-1, b, b)


def _streams(terms: Terms, decay: Tensor, read: str) -> Tensor:
    """Return q exp(g) and e exp(g) (or e, read before the decay) interleaved, [R, C, X, K]."""
    R, C, K = terms.q.shape
    queries = terms.q.new_empty(R, C, 1 if terms.e is None else 2, K)
    torch.mul(terms.q, decay, out=queries[:, :, 0])
    if terms.e is not None:
        if read == "post":
            torch.mul(terms.e, decay, out=queries[:, :, 1])
        else:
            queries[:, :, 1] = terms.e
    return queries


def channel_scores(terms: Terms, read: str, *, keep: bool) -> Scores:
    """Prepare a tile whose decay is per channel. `keep` stores what the backward needs of every join."""
    R, C, K = terms.q.shape
    decay = terms.g.exp()
    queries, keys = _streams(terms, decay, read), terms.k.clone()
    X = queries.shape[2]
    blocks = queries.new_zeros(R, C * X, C)
    # r = s carries no decay.
    blocks.view(R, C, X, C)[:, :, 0].diagonal(dim1=1, dim2=2).copy_((terms.q * terms.k).sum(-1))
    total, joins, b = decay, [], 1
    while b < C:
        pairs = R * C // (2 * b)
        query_half = queries.view(pairs, 2, b * X, K)[:, 1]
        key_half = keys.view(pairs, 2, b, K)[:, 0]
        both = total.view(pairs, 2, 1, K)
        product = torch.bmm(query_half, key_half.transpose(1, 2))
        _corner_view(blocks, b, X).copy_(product.view(R, -1, b * X, b))
        if keep:
            joins.append((query_half.clone(), key_half.clone(), both))
        query_half.mul_(both[:, 0])
        key_half.mul_(both[:, 1])
        total = both[:, 0] * both[:, 1]
        b *= 2
    blocks = blocks.view(R, C, X, C)
    inverse = unit_lower_inverse(blocks[:, :, 1]) if X == 2 else None
    return Scores(queries, keys, total.reshape(R, K), blocks, inverse, joins)


def channel_scores_backward(
    terms: Terms, scores: Scores, d_queries: Tensor, d_keys: Tensor, d_blocks: Tensor, tail: Tensor, read: str
) -> Terms:
    """Return the gradients of a tile's q, k, e, g (z is passed through by the caller).

    `d_queries` and `d_keys` are gradients of the factors the chain used and are overwritten; `d_blocks` [R, C, X, C]
    those of P and L, of which only the lower triangle is read; `tail` [R, K] is the gradient of G_C that the
    chain left.
    """
    R, C, K = terms.q.shape
    X = d_queries.shape[2]
    flat = d_blocks.view(R, C * X, C)
    # The decay of keys to the end of the chunk is also a function of G_C.
    tail = tail + (scores.keys * d_keys).sum(1)
    b = C // 2
    while scores.joins:
        # Taken off the list, so that each is freed once it is used.
        query_half, key_half, both = scores.joins.pop()
        pairs = R * C // (2 * b)
        d_query_half = d_queries.view(pairs, 2, b * X, K)[:, 1]
        d_key_half = d_keys.view(pairs, 2, b, K)[:, 0]
        corner = _corners(flat, b, X)
        d_query_half.mul_(both[:, 0]).add_(torch.bmm(corner, key_half))
        d_key_half.mul_(both[:, 1]).add_(torch.bmm(corner.transpose(1, 2), query_half))
        b //= 2
    decay = terms.g.exp()
    d_q = d_queries[:, :, 0] * decay
    d_e = None if X == 1 else d_queries[:, :, 1] * decay if read == "post" else d_queries[:, :, 1].clone()
    return _collect(terms, d_q, d_keys, d_e, d_blocks, tail, read)


def _collect(
    terms: Terms, d_q: Tensor, d_k: Tensor, d_e: Tensor | None, d_blocks: Tensor, tail: Tensor, read: str
) -> Terms:
    """Form the decay gradient from q dq - k dk + e de, then add the r = s terms, which no decay touches.

    That sum leaves rounding errors where a decay forgets all and its gradient, which holds exp(g) as a factor, is zero;
    a gate's rate would magnify them, so there the gradient is set to zero.
    """
    # Gradient with respect to G_r; with respect to G'_r it is e de.
    d_G = torch.addcmul(terms.q * d_q, terms.k, d_k, value=-1)
    d_read = None if d_e is None or terms.e is None else terms.e * d_e
    if d_read is not None:
        d_G += d_read
    scalar = terms.g.shape[-1] == 1
    if scalar:
        d_G = d_G.sum(-1, keepdim=True)
        tail = tail.sum(-1, keepdim=True)
    d_G[:, -1] += tail
    d_g = d_G.flip(1).cumsum(1).flip(1)
    if read == "pre" and d_read is not None:
        d_g -= d_read.sum(-1, keepdim=True) if scalar else d_read
    d_g.masked_fill_(terms.g < FORGOTTEN, 0)
    diagonal = d_blocks[:, :, 0].diagonal(dim1=1, dim2=2).unsqueeze(-1)
    d_q.addcmul_(diagonal, terms.k)
    d_k = torch.addcmul(d_k, diagonal, terms.q)
    return Terms(d_q, d_k, d_e, terms.z, d_g)


def _segment_decay(g: Tensor) -> Tensor:
    """Return exp(G_r - G_s) for r >= s and 0 above, [R, C, C], from g [R, C, 1]; sums segments, subtracts nothing."""
    C = g.shape[1]
    ones = torch.ones(C, C, dtype=torch.bool, device=g.device)
    # Column s starts its running sum after row s.
    sums = g.expand(-1, -1, C).masked_fill(~ones.tril(-1), 0).cumsum(1)
    return sums.exp().masked_fill_(~ones.tril(), 0)


def _scalar_factors(g: Tensor) -> tuple[Tensor, Tensor]:
    """Return exp(G_r) and exp(G_C - G_s), both [R, C, 1]; the second sums what follows row s, subtracts nothing."""
    after = torch.cat([g[:, 1:], torch.zeros_like(g[:, :1])], 1)
    return g.cumsum(1).exp(), after.flip(1).cumsum(1).flip(1).exp()


def _scalar_masks(g: Tensor, X: int, read: str) -> Tensor:
    """Return the decay factor of P (r >= s) and L (r > s), [R, C, X, C]."""
    segment = _segment_decay(g)
    if X == 1:
        return segment.unsqueeze(2)
    lower = torch.zeros_like(segment)
    if read == "post":
        lower.copy_(segment.tril(-1))
    else:
        # Row r's own decay is left out: the factor of row r - 1.
        lower[:, 1:] = segment[:, :-1]
    return torch.stack([segment, lower], 2)


def scalar_scores(terms: Terms, read: str, *, keep: bool) -> Scores:
    """Prepare a tile with one decay a head: two plain products and a mask."""
    del keep
    R, C, K = terms.q.shape
    from_start, to_end = _scalar_factors(terms.g)
    X = 1 if terms.e is None else 2
    raw = terms.q.unsqueeze(2) if terms.e is None else torch.stack([terms.q, terms.e], 2)
    blocks = torch.bmm(raw.view(R, C * X, K), terms.k.transpose(1, 2)).view(R, C, X, C)
    blocks *= _scalar_masks(terms.g, X, read)
    queries = raw * _row_factors(terms.g, from_start, X, read)
    inverse = unit_lower_inverse(blocks[:, :, 1]) if X == 2 else None
    return Scores(queries, terms.k * to_end, from_start[:, -1], blocks, inverse, [])


def _row_factors(g: Tensor, from_start: Tensor, X: int, read: str) -> Tensor:
    """Return exp(G_r) for the query and exp(G'_r) for the erase key, [R, C, X, 1]."""
    if X == 1:
        return from_start.unsqueeze(2)
    if read == "post":
        return from_start.unsqueeze(2).expand(-1, -1, 2, -1)
    before = torch.cat([torch.ones_like(from_start[:, :1]), from_start[:, :-1]], 1)
    return torch.stack([from_start, before], 2)


def scalar_scores_backward(
    terms: Terms, scores: Scores, d_queries: Tensor, d_keys: Tensor, d_blocks: Tensor, tail: Tensor, read: str
) -> Terms:
    """Return the gradients of a tile's q, k, e, g for a scalar decay; as `channel_scores_backward`."""
    R, C, K = terms.q.shape
    X = d_queries.shape[2]
    from_start, to_end = _scalar_factors(terms.g)
    tail = tail + (scores.keys * d_keys).sum(1)
    masked = d_blocks * _scalar_masks(terms.g, X, read)
    # r = s is added by `_collect`, apart from the decay.
    masked[:, :, 0].diagonal(dim1=1, dim2=2).zero_()
    masked = masked.view(R, C * X, C)
    raw = terms.q.unsqueeze(2) if terms.e is None else torch.stack([terms.q, terms.e], 2)
    d_raw = d_queries * _row_factors(terms.g, from_start, X, read)
    d_raw += torch.bmm(masked, terms.k).view(R, C, X, K)
    d_k = d_keys * to_end
    d_k += torch.bmm(masked.transpose(1, 2), raw.view(R, C * X, K))
    return _collect(terms, d_raw[:, :, 0], d_k, d_raw[:, :, 1] if X == 2 else None, d_blocks, tail, read)
