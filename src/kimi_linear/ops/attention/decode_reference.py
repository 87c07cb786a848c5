"""One query a sequence against its cache, in the obvious form: keys and values expanded, every score at once.

    GQA:  k_s, v_s of the query head's group;  o = sum_s softmax_s(scale q . k_s) v_s        (1)
    MLA:  [k_n ; v]_{h,s} = W_h c_s,  k_{h,s} = [k_n ; k_r]_{h,s};  then (1)                   (2)
          Kimi Linear checkpoint, MLA without positions: k_r is shared by the heads and not rotated.

Positions from `length` on do not exist; a length of 0 gives a zero row. With a window only the last `window` count.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kimi_linear.ops.attention.expand import expand_latent
from kimi_linear.ops.attention.lengths import seen
from kimi_linear.ops.attention.paging import unpaged
from kimi_linear.ops.autocast import without_autocast
from kimi_linear.ops.checks import compute_dtype


def _attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float, window: int | None) -> Tensor:
    """Eq. 1 for q [N, H, K], k [N, S, H, K], v [N, S, H, V], in the dtype of the arguments."""
    visible = seen(lengths, k.shape[1], window)
    mask = visible[:, None]
    scores = torch.einsum("nhk,nshk->nhs", q, k) * scale
    # A row that sees nothing would be 0 / 0.
    p = scores.masked_fill(~mask, -math.inf).softmax(-1).masked_fill(~mask, 0.0)
    # What is not seen may hold anything, and 0 * NaN is NaN.
    return torch.einsum("nhs,nshv->nhv", p, v.masked_fill(~visible[:, :, None, None], 0.0))


@torch.library.custom_op("kimi_linear::attention_decode_reference", mutates_args=())
def attention_decode_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None,
    block_table: Tensor | None = None,
) -> Tensor:
    """Eq. 1; arguments as in `attention_decode`, all given."""
    k, v = (unpaged(x, lengths, block_table) for x in (k, v))
    groups = q.shape[1] // k.shape[2]
    wide = compute_dtype(q)
    with without_autocast(q.device):
        k, v = (x.to(wide).repeat_interleave(groups, dim=2) for x in (k, v))
        return _attend(q.to(wide), k, v, lengths, scale, window).to(q.dtype).contiguous()


@torch.library.custom_op("kimi_linear::mla_decode_reference", mutates_args=())
def mla_decode_reference(
    q: Tensor,
    latent: Tensor,
    key_rope: Tensor,
    lengths: Tensor,
    kv_b: Tensor,
    nope_dim: int,
    scale: float,
    block_table: Tensor | None = None,
) -> Tensor:
    """Eq. 2; arguments as in `mla_decode`, all given."""
    latent, key_rope = (unpaged(x, lengths, block_table) for x in (latent, key_rope))
    wide, H = compute_dtype(q), q.shape[1]
    with without_autocast(q.device):
        k, v = expand_latent(latent.to(wide), key_rope.to(wide), kv_b.to(wide), H, nope_dim, "reference")
        return _attend(q.to(wide), k, v, lengths, scale, None).to(q.dtype).contiguous()


@attention_decode_reference.register_fake
def _fake_attention_decode(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(*q.shape[:2], v.shape[-1])


@mla_decode_reference.register_fake
def _fake_mla_decode(
    q: Tensor, latent: Tensor, key_rope: Tensor, lengths: Tensor, kv_b: Tensor, nope_dim: int, *rest: Any
) -> Tensor:
    return q.new_empty(*q.shape[:2], kv_b.shape[0] // q.shape[1] - nope_dim)
