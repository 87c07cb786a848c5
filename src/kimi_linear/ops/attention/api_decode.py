"""One query a sequence against its cache: grouped heads, and MLA absorbed. For inference: no gradients.

Shape letters as in api.py.
"""

from torch import Tensor

from kimi_linear.ops import native
from kimi_linear.ops.attention.api import check_grouped_heads, check_mla_heads, check_window
from kimi_linear.ops.attention.cpu_decode import attention_decode_cpu, mla_decode_cpu
from kimi_linear.ops.attention.decode_reference import attention_decode_reference, mla_decode_reference
from kimi_linear.ops.attention.decode_tiled import attention_decode_tiled, mla_decode_absorbed
from kimi_linear.ops.attention.paging import capacity
from kimi_linear.ops.attention.triton import backend as triton
from kimi_linear.ops.autocast import cast_inputs
from kimi_linear.ops.checks import (
    describe_call,
    expect_floating,
    expect_integer,
    expect_same_device,
    expect_same_dtype,
    expect_shape,
)
from kimi_linear.ops.registry import Backend, Call, define
from kimi_linear.ops.triton.backend import untried


def _runs_all(call: Call) -> list[str]:
    return []


def _refuse_cpu(call: Call) -> list[str]:
    return native.refuse(call)


ATTENTION_DECODE = define(
    "attention_decode",
    Backend("cpu", attention_decode_cpu, _refuse_cpu, "native kernels: the cache read once, in pieces threads share"),
    Backend("tiled", attention_decode_tiled, _runs_all, "a tile of the cache at a time, no head repeated"),
    Backend("reference", attention_decode_reference, _runs_all, "keys and values repeated for every query head"),
)
MLA_DECODE = define(
    "mla_decode",
    Backend("cpu", mla_decode_cpu, _refuse_cpu, "native kernels: absorbed, the latents read once for all heads"),
    Backend("triton", triton.mla_decode_triton, triton.refuse, "two launches on a GPU between two products", untried),
    Backend("absorbed", mla_decode_absorbed, _runs_all, "scores against the latent, a tile of the cache at a time"),
    Backend("reference", mla_decode_reference, _runs_all, "keys and values expanded from the latent"),
)


def _features(**given: object) -> list[str]:
    return [name for name, value in given.items() if value is not None]


def attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    block_table: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend from one query a sequence to its cached keys, the query's own included.

        o = sum_s softmax_s(scale q . k_s) v_s   over  length - window <= s < length

    A ring buffer of the last w keys needs no window: softmax does not mind their order, so pass
    `lengths = min(length, w)`.

    Args:
        q: Queries, [N, Hq, K].
        k: Cached keys, [N, S, Hkv, K], Hkv dividing Hq; any floating dtype.
        v: Cached values, [N, S, Hkv, V].
        lengths: Cached positions of each sequence, [N], int32 or int64, in [0, S]. What lies behind them is not used,
            and 0 gives a zero row. Values are checked on the CPU, elsewhere only when KIMI_LINEAR_DEBUG is on.
        scale: Multiplies the scores. Default: K ** -0.5.
        window: How many positions the query sees, itself included. Default: all.
        block_table: Pages of each sequence, [N, max_pages], int32; then k and v are pools [P, page_size, Hkv, ..], and
            S is max_pages * page_size. Same bits as the contiguous cache. Entries behind a length are not used.
        backend: "cpu", "tiled", "reference", or None for the best that supports the call.

    Returns:
        [N, Hq, V] in the dtype of q (under autocast: in autocast's). No gradient flows.

    Raises:
        ShapeError, DtypeError, DeviceError: An argument disagrees with the others; names it.

    Numerics: scores, softmax and sums in float32 (float64 for float64), whatever the cache's dtype.
    Cost: Hq * (K + V) multiply-adds a position; the caches are read once. "cpu" holds Hq * V floats for each 256
        positions (at most 64 pieces a sequence), "tiled" N * Hq * S float32 scores. Only "cpu" reads pages in place;
        the others gather them first.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(2, 4, 8), torch.randn(2, 16, 2, 8), torch.randn(2, 16, 2, 8)
        >>> attention_decode(q, k, v, torch.tensor([16, 3])).shape
        torch.Size([2, 4, 8])
    """
    op = "attention_decode"
    (q,) = cast_inputs(q)
    expect_shape(op, "q", q, [None] * 3, "N, Hq, K")
    N, Hq, K = q.shape
    rows, S = capacity(op, "k", k, N, block_table)
    expect_shape(op, "k", k, [rows, None, None, K], "N, S, Hkv, K")
    Hkv = k.shape[2]
    expect_shape(op, "v", v, [*k.shape[:3], None], "N, S, Hkv, V")
    expect_shape(op, "lengths", lengths, [N], "N")
    check_grouped_heads(op, Hq, Hkv)
    check_window(op, window)
    expect_floating(op, q=q, k=k, v=v)
    expect_integer(op, "lengths", lengths)
    expect_same_device(op, q=q, k=k, v=v, lengths=lengths)
    sizes = {"N": N, "S": S, "Hq": Hq, "Hkv": Hkv, "K": K, "V": v.shape[-1]}
    call = describe_call(q, sizes=sizes, features=_features(window=window, paged=block_table))
    scale = K**-0.5 if scale is None else float(scale)
    run = ATTENTION_DECODE.choose(call, backend).run
    return run(q.detach(), k.detach(), v.detach(), lengths, scale, window, block_table)


def mla_decode(
    q: Tensor,
    latent: Tensor,
    key_rope: Tensor,
    lengths: Tensor,
    kv_b: Tensor,
    *,
    nope_dim: int,
    scale: float | None = None,
    block_table: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Multi-head latent attention of one query a sequence against its latent cache, absorbed.

        s_hs = scale ((K_h^T q_n) . c_s + q_r . k_rs),   o_h = V_h sum_s softmax_s(s_hs) c_s
        [K_h ; V_h] = rows h * (dn + dv) on of kv_b. Equal to `mla_attention`'s last row up to rounding.

    Args:
        q: Queries, [N, H, dn + dr].
        latent: Cached normalised latents c, [N, S, R]; any floating dtype.
        key_rope: Cached shared key parts, [N, S, dr].
        lengths: Cached positions of each sequence, [N], as in `attention_decode`.
        kv_b: The expansion, [H * (dn + dv), R], in the dtype of q.
        nope_dim: dn.
        scale: Multiplies the scores. Default: (dn + dr) ** -0.5.
        block_table: As in `attention_decode`; then latent is [P, page_size, R] and key_rope [P, page_size, dr].
        backend: "cpu", "triton", "absorbed", "reference", or None for the best that supports the call.

    Returns:
        [N, H, dv] in the dtype of q (under autocast: in autocast's). No gradient flows.

    Raises:
        ShapeError, DtypeError, DeviceError: An argument disagrees with the others; names it.

    Numerics: scores, softmax and the sum over the cache in float32 (float64 for float64). "absorbed" rounds the
        absorbed query and the mixed latent to the dtype of q, as the expanded form rounds keys and values; "cpu" only
        the absorbed query and the probabilities, and these only where q and the cache are bfloat16 and the processor
        multiplies pairs of it. "triton" rounds what "absorbed" does and, where q and the cache are half precision, the
        probabilities, to their common dtype or bfloat16; float32 operands go as three products of tf32.
    Cost: H * (2 * R + dr) multiply-adds a position and H * (dn + dv) * R a sequence. "cpu" reads the latents
        once and holds H * R floats for each 256 positions (at most 64 pieces a sequence); "absorbed" reads them twice
        and holds N * H * S float32 scores. "triton" reads them once for every 32 heads (in float32 twice for every 16),
        pages in place, and holds N * H * (R + 2) floats for each 512 positions of the capacity S (at most 64 pieces a
        sequence). What its kernels give a sequence depends on its own length and cache alone, not on N, S or pages; for
        a given N neither do the products with kv_b, which are torch's. No key or value is held.

    Example:
        >>> import torch
        >>> q, c, r = torch.randn(2, 3, 6), torch.randn(2, 9, 16), torch.randn(2, 9, 2)
        >>> mla_decode(q, c, r, torch.tensor([9, 4]), torch.randn(3 * (4 + 5), 16), nope_dim=4).shape
        torch.Size([2, 3, 5])
    """
    op = "mla_decode"
    q, kv_b = cast_inputs(q, kv_b)
    expect_shape(op, "q", q, [None] * 3, "N, H, dn + dr")
    N, H, width = q.shape
    rows, S = capacity(op, "latent", latent, N, block_table)
    expect_shape(op, "latent", latent, [rows, None, None], "N, S, R")
    R = latent.shape[2]
    expect_shape(op, "key_rope", key_rope, [*latent.shape[:2], None], "N, S, dr")
    expect_shape(op, "lengths", lengths, [N], "N")
    check_mla_heads(op, H, width, kv_b, nope_dim, R, key_rope.shape[-1])
    expect_floating(op, q=q, latent=latent, key_rope=key_rope, kv_b=kv_b)
    expect_same_dtype(op, q=q, kv_b=kv_b)
    expect_integer(op, "lengths", lengths)
    expect_same_device(op, q=q, latent=latent, key_rope=key_rope, lengths=lengths, kv_b=kv_b)
    sizes = {"N": N, "S": S, "H": H, "R": R, "K": width, "dr": key_rope.shape[-1]}
    call = describe_call(q, sizes=sizes, features=_features(paged=block_table))
    scale = width**-0.5 if scale is None else float(scale)
    run = MLA_DECODE.choose(call, backend).run
    return run(q.detach(), latent.detach(), key_rope.detach(), lengths, kv_b.detach(), nope_dim, scale, block_table)
