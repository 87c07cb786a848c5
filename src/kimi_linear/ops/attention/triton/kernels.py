"""Attention of one query a sequence and H heads over one shared cache: pieces of a context, then their sum.

Everything is transposed, positions down and heads across: the cache's tile is the left operand of both products, as it
lies in memory for the scores and turned for the values, and the probabilities the right one as they come. So no result
of a product is turned, and a few heads fill a product of 64 rows.
"""

import torch
import triton
import triton.language as tl

from kimi_linear.ops.triton.device import INTERPRETED, narrow, save

LANGUAGE_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def product(a, b, total, dtype: tl.constexpr):
    """Return total + a b in float32, of operands in dtype; of float32 in three products of tf32, near float32."""
    if dtype == tl.float32:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="tf32x3")
    a, b = narrow(a, dtype), narrow(b, dtype)
    if INTERPRETED:
        return total + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, total)


@triton.jit
def context(lengths, sequence, S, PIECE: tl.constexpr, MOST: tl.constexpr):
    """Return a sequence's positions, and how many of them a program takes: of these alone, and never of neighbours."""
    length = tl.minimum(tl.maximum(tl.load(lengths + sequence), 0), S).to(tl.int32)
    return length, PIECE * tl.maximum(tl.cdiv(length, PIECE * MOST), 1)


@triton.jit
def places(s, valid, sequence, table, PAGES, POOL, PAGE: tl.constexpr):
    """Return row and column of the cache where positions s stand: the sequence's, or with PAGE those of the table."""
    if PAGE > 0:
        page = tl.load(table + sequence * PAGES + s // PAGE, mask=valid, other=0).to(tl.int64)
        # On a GPU nobody looks at the table first: what it names outside of the pool must not be read.
        row, column = tl.minimum(tl.maximum(page, 0), POOL - 1), s % PAGE
    else:
        row, column = sequence, s
    return row, column


@triton.jit(do_not_specialize=["scale", "S", "H", "PAGES", "POOL", "PIECES"])
def piece_kernel(
    absorbed, query_rope, latent, key_rope, lengths, table, tops, sums, mixed,
    scale,
    S, H, PAGES, POOL, PIECES,
    absorbed_row, absorbed_head, query_row, query_head, latent_row, latent_token, rope_row, rope_token,
    R: tl.constexpr, DR: tl.constexpr, RP: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr,
    BH: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, PIECE: tl.constexpr, MOST: tl.constexpr,
    WORK: tl.constexpr,
):  # fmt: skip
    """top = max_s z_s, sum = sum_s 2^(z_s - top), mixed = sum_s 2^(z_s - top) c_s, z = scale log2(e) (a . c + q . k).

    Over one piece of a sequence's positions, for BH heads. Writes nothing for a piece behind the sequence's last
    position. Grid: head blocks * pieces * sequences, head blocks innermost.
    """
    BLOCKS = tl.cdiv(H, BH)
    pid = tl.program_id(0).to(tl.int64)
    h = (pid % BLOCKS).to(tl.int32) * BH + tl.arange(0, BH)
    sequence, piece = pid // BLOCKS // PIECES, (pid // BLOCKS % PIECES).to(tl.int32)
    length, size = context(lengths, sequence, S, PIECE, MOST)
    start = piece * size
    if start >= length:
        return
    end = tl.minimum(start + size, length)
    r, d = tl.arange(0, RP), tl.arange(0, DP)
    heads = (h < H)[None, :]
    a_at = absorbed + sequence * absorbed_row + h[None, :].to(tl.int64) * absorbed_head
    if BR == RP:
        a = tl.load(a_at + r[:, None], mask=heads & (r < R)[:, None], other=0.0)
    if DR > 0:
        q_at = query_rope + sequence * query_row + h[None, :] * query_head
        q = tl.load(q_at + d[:, None], mask=heads & (d < DR)[:, None], other=0.0)
    top = tl.full([BH], float("-inf"), tl.float32)
    total = tl.zeros([BH], tl.float32)
    out = tl.zeros([RP, BH], tl.float32)
    for first in range(start, end, BN):
        s = first + tl.arange(0, BN)
        valid = s < end
        row, column = places(s, valid, sequence, table, PAGES, POOL, PAGE)
        z = tl.zeros([BN, BH], tl.float32)
        c_at = latent + (row * latent_row + column.to(tl.int64) * latent_token)[:, None]
        if BR == RP:
            tile = tl.load(c_at + r[None, :], mask=valid[:, None] & (r < R)[None, :], other=0.0)
            z = product(tile, a, z, WORK)
            turned = tl.trans(tile)
        else:
            for at in range(0, RP, BR):
                part = at + tl.arange(0, BR)
                tile = tl.load(c_at + part[None, :], mask=valid[:, None] & (part < R)[None, :], other=0.0)
                a = tl.load(a_at + part[:, None], mask=heads & (part < R)[:, None], other=0.0)
                z = product(tile, a, z, WORK)
            c_turned = latent + (row * latent_row + column.to(tl.int64) * latent_token)[None, :]
            turned = tl.load(c_turned + r[:, None], mask=valid[None, :] & (r < R)[:, None], other=0.0)
        if DR > 0:
            k_at = key_rope + (row * rope_row + column.to(tl.int64) * rope_token)[:, None]
            k = tl.load(k_at + d[None, :], mask=valid[:, None] & (d < DR)[None, :], other=0.0)
            z = product(k, q, z, WORK)
        z = tl.where(valid[:, None], z * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(z, 0))
        p = tl.exp2(z - higher[None, :])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(p, 0)
        out = product(turned, p, out * fade[None, :], WORK)
        top = higher
    at = (sequence * PIECES + piece) * H + h
    tl.store(tops + at, top, mask=h < H)
    tl.store(sums + at, total, mask=h < H)
    save(mixed + at[None, :] * R + r[:, None], out, heads & (r < R)[:, None])


@triton.jit(do_not_specialize=["S", "N", "H", "PIECES"])
def join_kernel(
    tops, sums, mixed, lengths, o,
    S, N, H, PIECES,
    R: tl.constexpr, BR: tl.constexpr, G: tl.constexpr, PIECE: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """o = sum_i w_i mixed_i / sum_i w_i sum_i over a sequence's pieces i, w_i = 2^(top_i - max top); no position: zero.

    The order is that of the pieces, G at a time. o is [H, N, R]. Grid: blocks of BR channels * N * H, blocks innermost.
    """
    BLOCKS: tl.constexpr = (R + BR - 1) // BR
    pid = tl.program_id(0).to(tl.int64)
    row = pid // BLOCKS
    head, sequence = row // N, row % N
    length, size = context(lengths, sequence, S, PIECE, MOST)
    pieces = tl.cdiv(length, size)
    r, g = (pid % BLOCKS) * BR + tl.arange(0, BR), tl.arange(0, G)
    highest = tl.full([G], float("-inf"), tl.float32)
    for first in range(0, pieces, G):
        at = (sequence * PIECES + first + g) * H + head
        highest = tl.maximum(highest, tl.load(tops + at, mask=first + g < pieces, other=float("-inf")))
    top = tl.max(highest, 0)
    total = tl.zeros([G], tl.float32)
    out = tl.zeros([BR], tl.float32)
    for first in range(0, pieces, G):
        inside = first + g < pieces
        at = (sequence * PIECES + first + g) * H + head
        weight = tl.exp2(tl.load(tops + at, mask=inside, other=float("-inf")) - top)
        total += weight * tl.load(sums + at, mask=inside, other=0.0)
        part = tl.load(mixed + at[:, None] * R + r[None, :], mask=inside[:, None] & (r < R)[None, :], other=0.0)
        out += tl.sum(weight[:, None] * part, 0)
    whole = tl.sum(total, 0)
    save(o + row * R + r, tl.where(pieces > 0, out / tl.where(pieces > 0, whole, 1.0), 0.0), r < R)
