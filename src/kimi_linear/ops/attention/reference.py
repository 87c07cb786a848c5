"""Causal softmax attention in the obvious form: every score, one mask, one softmax, all in memory at once.

    p_{ts} = exp(scale q_t . k_s) / sum_{s'} exp(scale q_t . k_{s'})   over the visible s    (1)
    o_t    = sum_s p_{ts} v_s                                                                (2)

s is visible to t when both belong to one sequence and  t' - window < s' <= t',  where s' counts from the start of the
sequence's keys and t' = t + (number of its keys - number of its queries): the last query sees the last key.

Backward of (1) and (2), with dp_{ts} = do_t . v_s:

    dv_s = sum_t p_{ts} do_t                                                                 (3)
    da_{ts} = p_{ts} (dp_{ts} - sum_{s'} p_{ts'} dp_{ts'})                                   (4)
    dq_t = scale sum_s da_{ts} k_s,      dk_s = scale sum_t da_{ts} q_t                      (5)
"""

import math

import torch
from torch import Tensor

from kimi_linear.ops.attention.autograd import check_packed_values, register
from kimi_linear.ops.autocast import without_autocast
from kimi_linear.ops.checks import compute_dtype


def visible(
    T: int, S: int, window: int | None, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, device: torch.device
) -> Tensor:
    """Return which keys each query sees, bool [T, S]."""
    starts_q = torch.tensor([0, T], device=device) if cu_seqlens is None else cu_seqlens.long()
    starts_k = torch.tensor([0, S], device=device) if cu_seqlens_k is None else cu_seqlens_k.long()
    query, key = torch.arange(T, device=device), torch.arange(S, device=device)
    # right=True puts a token behind every empty sequence that starts at its offset.
    sequence_q = torch.searchsorted(starts_q, query, right=True) - 1
    sequence_k = torch.searchsorted(starts_k, key, right=True) - 1
    ahead = starts_k.diff() - starts_q.diff()
    query = query - starts_q[sequence_q] + ahead[sequence_q]
    key = key - starts_k[sequence_k]
    mask = (sequence_q[:, None] == sequence_k[None]) & (key[None] <= query[:, None])
    return mask if window is None else mask & (key[None] > query[:, None] - window)


def _probabilities(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Eq. 1 for q [B, T, H, G, K] and k [B, S, H, K]: [B, H, G, T, S]."""
    scores = torch.einsum("bthgk,bshk->bhgts", q, k) * scale
    return scores.masked_fill(~mask, -math.inf).softmax(-1)


def _grouped(x: Tensor, num_kv_heads: int) -> Tensor:
    """Split the query heads by the key head they read: [B, T, Hq, K] -> [B, T, Hkv, G, K], in the compute dtype."""
    return x.to(compute_dtype(x)).unflatten(2, (num_kv_heads, -1))


@torch.library.custom_op("kimi_linear::attention_reference", mutates_args=())
def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    window: int | None,
) -> Tensor:
    """Equations 1 and 2; arguments as in `attention`, all given."""
    check_packed_values(q, k, cu_seqlens, cu_seqlens_k)
    wide = compute_dtype(q)
    mask = visible(q.shape[1], k.shape[1], window, cu_seqlens, cu_seqlens_k, q.device)
    with without_autocast(q.device):
        p = _probabilities(_grouped(q, k.shape[2]), k.to(wide), mask, scale)
        o = torch.einsum("bhgts,bshv->bthgv", p, v.to(wide))
    return o.flatten(2, 3).to(q.dtype).contiguous()


@torch.library.custom_op("kimi_linear::attention_reference_backward", mutates_args=())
def attention_reference_backward(
    d_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Equations 3 to 5."""
    wide = compute_dtype(q)
    mask = visible(q.shape[1], k.shape[1], window, cu_seqlens, cu_seqlens_k, q.device)
    grouped, keys, grad = _grouped(q, k.shape[2]), k.to(wide), _grouped(d_o, k.shape[2])
    with without_autocast(q.device):
        p = _probabilities(grouped, keys, mask, scale)
        # Eq. 3
        d_v = torch.einsum("bhgts,bthgv->bshv", p, grad)
        # Eq. 4
        d_p = torch.einsum("bthgv,bshv->bhgts", grad, v.to(wide))
        d_a = p * (d_p - (p * d_p).sum(-1, keepdim=True)) * scale
        # Eq. 5
        d_q = torch.einsum("bhgts,bshk->bthgk", d_a, keys).flatten(2, 3)
        d_k = torch.einsum("bhgts,bthgk->bshk", d_a, grouped)
    return d_q.to(q.dtype).contiguous(), d_k.to(k.dtype).contiguous(), d_v.to(v.dtype).contiguous()


register(attention_reference, attention_reference_backward)
