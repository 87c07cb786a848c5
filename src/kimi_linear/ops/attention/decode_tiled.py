"""One query a sequence against its cache, tile by tile: the float32 scores are the only temporary as long as the cache.

MLA is absorbed: with W_h = [K_h ; V_h] and the query's two parts q_n, q_r,

    a_h   = K_h^T q_n                                       (1)
    s_hs  = scale (a_h . c_s + q_r . k_rs),  p = softmax(s) (2)
    o_h   = V_h sum_s p_hs c_s                              (3)

so the cache is read twice and neither keys nor values are ever expanded. Equal to decode_reference.py's Eq. 2 up to
rounding. Tiles of a half-precision cache are widened one at a time.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kimi_linear.ops.attention.decode_reference import _fake_attention_decode, _fake_mla_decode
from kimi_linear.ops.attention.lengths import seen
from kimi_linear.ops.attention.paging import unpaged
from kimi_linear.ops.autocast import without_autocast
from kimi_linear.ops.checks import compute_dtype

# Positions a tile: 256 to 4096 read alike on one core; this one keeps a widened tile near the size of the caches.
_TILE = 1024

# Sequence rows [n0:n1], first and last visible position, and a mask where these do not say it all.
Part = tuple[slice, slice, Tensor | None]


def _parts(lengths: Tensor, S: int, window: int | None) -> Iterator[Part]:
    """Cut a decode call into parts.

    On the CPU each sequence alone, over its own positions only. Elsewhere the whole batch under a mask, since reading
    the lengths would wait for the device.
    """
    if lengths.device.type != "cpu":
        yield slice(0, lengths.shape[0]), slice(0, S), seen(lengths, S, window)
        return
    for n, length in enumerate(lengths.tolist()):
        first = 0 if window is None else max(0, length - window)
        yield slice(n, n + 1), slice(first, length), None


def _weigh(pairs: list[tuple[Tensor, Tensor]], values: Tensor, span: slice, mask: Tensor | None) -> Tensor:
    """Softmax of the summed scores of the pairs, weighing the values: two passes over tiles of the span.

    Each pair is a scaled query [n, h, g, K] in the compute dtype and its keys [n, h, S, K]; values [n, h, S, V].
    """
    query = pairs[0][0]
    tiles = [slice(s, min(s + _TILE, span.stop)) for s in range(span.start, span.stop, _TILE)]
    scores = query.new_empty(*query.shape[:-1], span.stop - span.start)
    for tile in tiles:
        part = sum(q @ keys[:, :, tile].to(q.dtype).mT for q, keys in pairs)
        scores[..., tile.start - span.start : tile.stop - span.start] = part
    # [n, 1, S, 1]
    hidden = None if mask is None else ~mask[:, None, :, None]
    if hidden is None:
        p = scores.softmax(-1)
    else:
        # A row that sees nothing would be 0 / 0.
        p = scores.masked_fill_(hidden.mT, -math.inf).softmax(-1).masked_fill_(hidden.mT, 0.0)
    total = query.new_zeros(*query.shape[:-1], values.shape[-1])
    for tile in tiles:
        value = values[:, :, tile].to(query.dtype)
        # What is not seen may hold anything, and 0 * NaN is NaN.
        value = value if hidden is None else value.masked_fill(hidden[:, :, tile], 0.0)
        total += p[..., tile.start - span.start : tile.stop - span.start] @ value
    return total


@torch.library.custom_op("kimi_linear::attention_decode_tiled", mutates_args=())
def attention_decode_tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None,
    block_table: Tensor | None = None,
) -> Tensor:
    """Run grouped heads; arguments as in `attention_decode`, all given."""
    k, v = (unpaged(x, lengths, block_table) for x in (k, v))
    o = q.new_empty(*q.shape[:2], v.shape[-1])
    # [N, Hkv, G, K], [N, Hkv, S, K] and [N, Hkv, S, V]
    query = (q.to(compute_dtype(q)) * scale).unflatten(1, (k.shape[2], -1))
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    with without_autocast(q.device):
        for rows, span, mask in _parts(lengths, k.shape[1], window):
            o[rows] = _weigh([(query[rows], keys[rows])], values[rows], span, mask).flatten(1, 2)
    return o


@torch.library.custom_op("kimi_linear::mla_decode_absorbed", mutates_args=())
def mla_decode_absorbed(
    q: Tensor,
    latent: Tensor,
    key_rope: Tensor,
    lengths: Tensor,
    kv_b: Tensor,
    nope_dim: int,
    scale: float,
    block_table: Tensor | None = None,
) -> Tensor:
    """Equations 1 to 3; arguments as in `mla_decode`, all given."""
    latent, key_rope = (unpaged(x, lengths, block_table) for x in (latent, key_rope))
    wide = compute_dtype(q)
    weights = kv_b.unflatten(0, (q.shape[1], -1))
    # One key head, read by all query heads: [N, 1, S, R] and [N, 1, S, dr]
    latents, keys_rope = latent[:, None], key_rope[:, None]
    with without_autocast(q.device):
        # Eq. 1, a batch over heads. The weights stay in their dtype: widening them costs more than reading them.
        absorbed = torch.bmm(q[..., :nope_dim].transpose(0, 1), weights[:, :nope_dim]).transpose(0, 1)
        absorbed, query_rope = ((x.to(wide) * scale)[:, None] for x in (absorbed, q[..., nope_dim:]))
        mixed = torch.empty_like(absorbed)
        for rows, span, mask in _parts(lengths, latent.shape[1], None):
            pairs = [(absorbed[rows], latents[rows]), (query_rope[rows], keys_rope[rows])]
            # Eq. 2 and the sum of Eq. 3
            mixed[rows] = _weigh(pairs, latents[rows], span, mask)
        # Eq. 3, weights on the left: the other way round, torch repacks them at every call in half precision.
        o = torch.bmm(weights[:, nope_dim:], mixed[:, 0].to(q.dtype).permute(1, 2, 0))
    return o.permute(2, 0, 1).contiguous()


attention_decode_tiled.register_fake(_fake_attention_decode)
mla_decode_absorbed.register_fake(_fake_mla_decode)
