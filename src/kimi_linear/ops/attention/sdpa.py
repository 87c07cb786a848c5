"""Causal softmax attention through torch's scaled_dot_product_attention, one call a sequence or a block of rows.

Forward: SDPA with is_causal where the mask is the plain triangle, else blocks of query rows with a small mask each.
Backward: reference.py's equations 3 to 5 in blocks of rows, from q, k, v alone. A block holds all keys its rows see, so
the softmax is taken again instead of keeping its statistics, and nothing of size T x S ever exists.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.ops.attention.autograd import check_packed_values, register
from kimi_linear.ops.attention.blocks import block_mask, block_rows, blocks
from kimi_linear.ops.autocast import without_autocast
from kimi_linear.ops.checks import compute_dtype

# Elements of one temporary of a block: 16 MiB in float32.
_BUDGET = 1 << 22


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Tensor:
    """Call SDPA on [B, H, T, K] views, heads grouped; the CPU's flash kernel wants K == V and a dense last axis."""
    K, V = q.shape[-1], v.shape[-1]
    if q.device.type == "cpu" and K != V:
        q, k, v = (F.pad(x, (0, max(K, V) - x.shape[-1])) for x in (q, k, v))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=grouped)
    return o[..., :V]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """Attend within one sequence, or a batch of equally long ones: [B, T, Hq, V]. Differentiable by torch alone."""
    T, S = q.shape[1], k.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if window is not None and window >= S:
        window = None
    if T == 0:
        return q.new_empty(q.shape[0], 0, q.shape[1], v.shape[-1])
    if window is None and T in (1, S):
        return _sdpa(q, k, v, None, scale, is_causal=T > 1).transpose(1, 2)
    parts = []
    for rows, columns in blocks(T, S, window, block_rows(S if window is None else window, _BUDGET)):
        mask = block_mask(T, S, window, (rows, columns), q.device)
        parts.append(_sdpa(q[:, :, rows], k[:, :, columns], v[:, :, columns], mask, scale, is_causal=False))
    return torch.cat(parts, dim=2).transpose(1, 2)


def _spans(x: Tensor, cu_seqlens: Tensor | None) -> list[slice]:
    """Return where each sequence's tokens are; one span of everything when not packed."""
    if cu_seqlens is None:
        return [slice(0, x.shape[1])]
    offsets = cu_seqlens.tolist()
    return [slice(a, b) for a, b in pairwise(offsets)]


@torch.library.custom_op("kimi_linear::attention_sdpa", mutates_args=())
def attention_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    window: int | None,
) -> Tensor:
    """Forward; arguments as in `attention`, all given."""
    check_packed_values(q, k, cu_seqlens, cu_seqlens_k)
    o = q.new_empty(*q.shape[:3], v.shape[-1])
    with without_autocast(q.device):
        for rows, columns in zip(_spans(q, cu_seqlens), _spans(k, cu_seqlens_k), strict=True):
            o[:, rows] = attend(q[:, rows], k[:, columns], v[:, columns], scale, window)
    return o


def _rows_by_key_head(x: Tensor, num_kv_heads: int) -> Tensor:
    """Lay query-side rows out by the key head they read: [B, R, Hq, K] -> [B * Hkv, G * R, K]."""
    return x.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3).flatten(0, 1)


def _attend_backward(d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> list[Tensor]:
    """Gradients of `attend` for q, k, v, each in its layout, in the compute dtype."""
    (B, T, Hq, K), (S, Hkv) = q.shape, k.shape[1:3]
    wide, low = compute_dtype(q), q.dtype
    keys, values = (x.transpose(1, 2).flatten(0, 1).to(wide) for x in (k, v))
    low_keys = keys.to(low)
    d_q, d_k, d_v = q.new_empty(q.shape, dtype=wide), torch.zeros_like(keys), torch.zeros_like(values)
    seen = S if window is None else min(S, window)
    for rows, columns in blocks(T, S, window, block_rows(B * Hq * seen, _BUDGET)):
        query, grad = (_rows_by_key_head(x[:, rows], Hkv) for x in (q, d_o))
        mask = block_mask(T, S, window, (rows, columns), q.device)
        # The two products that meet the softmax stay wide; those behind it may take the input's dtype, since a
        # rounded factor there is an error of its own size only.  p: [B * Hkv, G * R, S']
        scores = torch.bmm(query.to(wide), keys[:, columns].mT).mul_(scale)
        p = scores.unflatten(1, (-1, mask.shape[0])).masked_fill_(~mask, -math.inf).softmax(-1).flatten(1, 2)
        d_a = torch.bmm(grad.to(wide), values[:, columns].mT)
        d_a.sub_((d_a * p).sum(-1, keepdim=True)).mul_(p).mul_(scale)
        p, d_a = p.to(low), d_a.to(low)
        d_v[:, columns] += torch.bmm(p.mT, grad)
        d_k[:, columns] += torch.bmm(d_a.mT, query)
        d_rows = torch.bmm(d_a, low_keys[:, columns]).view(B, Hkv, Hq // Hkv, -1, K)
        d_q[:, rows] = d_rows.permute(0, 3, 1, 2, 4).flatten(2, 3)
    return [d_q, *(x.view(B, Hkv, S, -1).transpose(1, 2) for x in (d_k, d_v))]


@torch.library.custom_op("kimi_linear::attention_sdpa_backward", mutates_args=())
def attention_sdpa_backward(
    d_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward, sequence by sequence."""
    # zeros: keys of a sequence without queries get no gradient.
    d_q, d_k, d_v = (x.new_zeros(x.shape) for x in (q, k, v))
    with without_autocast(q.device):
        for rows, columns in zip(_spans(q, cu_seqlens), _spans(k, cu_seqlens_k), strict=True):
            if rows.start == rows.stop:
                continue
            q_n, k_n, v_n = q[:, rows], k[:, columns], v[:, columns]
            d_q[:, rows], d_k[:, columns], d_v[:, columns] = _attend_backward(
                d_o[:, rows], q_n, k_n, v_n, scale, window
            )
    return d_q, d_k, d_v


register(attention_sdpa, attention_sdpa_backward)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    window: int | None,
) -> Tensor:
    """Run the op; off the CPU an unpacked call is left to SDPA's own autograd and its fused backward kernels."""
    if cu_seqlens is None and q.device.type != "cpu":
        return attend(q, k, v, scale, window)
    return attention_sdpa(q, k, v, cu_seqlens, cu_seqlens_k, scale, window)
