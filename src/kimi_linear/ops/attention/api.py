"""Causal softmax attention over whole prompts: grouped heads, sliding window, packed sequences, MLA expanded.

Shape letters beside the usual: S keys a sequence, Hq query heads, Hkv key heads, dn and dr the query's and key's parts
without and with positions, dv the MLA value width. One token against a cache is in api_decode.py.
"""

from torch import Tensor

from kimi_linear.base.errors import ShapeError
from kimi_linear.ops.attention import cpu, sdpa
from kimi_linear.ops.attention.expand import expand_latent
from kimi_linear.ops.attention.reference import attention_reference
from kimi_linear.ops.autocast import cast_inputs
from kimi_linear.ops.checks import (
    describe_call,
    expect_cu_seqlens,
    expect_floating,
    expect_same_device,
    expect_same_dtype,
    expect_shape,
)
from kimi_linear.ops.registry import Backend, Call, define


def _runs_all(call: Call) -> list[str]:
    return []


ATTENTION = define(
    "attention",
    Backend("cpu", cpu.run, cpu.refuse, "native kernels: tiles of keys under a running maximum, recomputing backward"),
    Backend("sdpa", sdpa.run, _runs_all, "torch's scaled_dot_product_attention, blocks of rows, recomputing backward"),
    Backend("reference", attention_reference, _runs_all, "every score in memory at once"),
)


def check_window(op: str, window: int | None) -> None:
    """Raise ShapeError for a window that sees nothing."""
    if window is not None and window < 1:
        raise ShapeError(f"{op}: window is {window}, expected at least 1 (the token itself) or None for no limit.")


def check_grouped_heads(op: str, Hq: int, Hkv: int) -> None:
    """Raise ShapeError unless the key heads divide the query heads."""
    if Hkv == 0 or Hq % Hkv:
        raise ShapeError(f"{op}: q has {Hq} heads, expected a multiple of the {Hkv} heads of k.")


def _check_lengths(op: str, q: Tensor, k: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None) -> None:
    """Check what can be seen of the sequence lengths without reading the offsets."""
    (B, T), S = q.shape[:2], k.shape[1]
    if cu_seqlens is None:
        if cu_seqlens_k is not None:
            raise ShapeError(f"{op}: cu_seqlens_k is given without cu_seqlens; give both, or neither.")
        if T > S:
            raise ShapeError(
                f"{op}: {T} queries but {S} keys; give the keys of every query too, the cached ones first."
            )
        return
    N = expect_cu_seqlens(op, cu_seqlens, B, q.device)
    if cu_seqlens_k is not None:
        N_k = expect_cu_seqlens(op, cu_seqlens_k, B, q.device)
        if N_k != N:
            raise ShapeError(f"{op}: cu_seqlens_k has {N_k} sequences, expected {N} as in cu_seqlens.")
    elif T != S:
        raise ShapeError(f"{op}: {T} packed queries but {S} keys; give cu_seqlens_k, the offsets of the keys.")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend causally from queries to keys, the last query aligned with the last key.

        o_t = sum_s softmax_s(scale q_t . k_s) v_s   over  t' - window < s <= t',   t' = t + S - T
        Query head h reads key head h // (Hq / Hkv). Hkv = Hq is MHA, Hkv = 1 is MQA.

    Args:
        q: Queries, [B, T, Hq, K].
        k: Keys, [B, S, Hkv, K], Hkv dividing Hq, S >= T. With S > T the first S - T keys come from a cache.
        v: Values, [B, S, Hkv, V].
        scale: Multiplies the scores. Default: K ** -0.5.
        window: How many keys a query sees, itself included. Default: all.
        cu_seqlens: Query offsets of packed sequences, [N + 1], int32 or int64, first 0, last T; needs B == 1.
            Sequences may be empty.
        cu_seqlens_k: Key offsets, [N + 1]. Default: `cu_seqlens`. No sequence may have fewer keys than queries.
        backend: "cpu", "sdpa", "reference", or None for the best that supports the call.

    Returns:
        [B, T, Hq, V] in the dtype of q (under autocast: in autocast's).

    Raises:
        ShapeError, DtypeError, DeviceError: An argument disagrees with the others; names it.
        BackendError: The named backend is unknown or cannot run this call.

    Numerics: softmax and sums in float32 (float64 for float64). In half precision, probabilities are rounded to the
        input's dtype before they meet the values, and in the backward before they meet queries, keys and gradients.
    Cost: T * S * Hq * (K + V) multiply-adds, about half of it when S == T. Extra memory is bounded: masks and
        scores exist for a block of rows only. Beside those, "cpu" holds k and v packed (64 MiB of them at a time, or
        one head), keeps o and two floats a query and head for the backward, which runs a key head of a sequence a
        thread and holds its packed tensors and float32 gradients; the backward of "sdpa" holds k and v widened, and
        their gradients.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(1, 8, 4, 16), torch.randn(1, 8, 2, 16), torch.randn(1, 8, 2, 16)
        >>> attention(q, k, v).shape
        torch.Size([1, 8, 4, 16])
    """
    q, k, v = cast_inputs(q, k, v)
    expect_shape("attention", "q", q, [None] * 4, "B, T, Hq, K")
    (B, T, Hq, K), (S, Hkv) = q.shape, (k.shape[1], k.shape[2]) if k.ndim == 4 else (None, None)
    expect_shape("attention", "k", k, [B, S, Hkv, K], "B, S, Hkv, K")
    expect_shape("attention", "v", v, [B, S, Hkv, None], "B, S, Hkv, V")
    check_grouped_heads("attention", Hq, k.shape[2])
    check_window("attention", window)
    expect_floating("attention", q=q, k=k, v=v)
    expect_same_dtype("attention", q=q, k=k, v=v)
    expect_same_device("attention", q=q, k=k, v=v)
    _check_lengths("attention", q, k, cu_seqlens, cu_seqlens_k)
    if cu_seqlens is not None and cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens
    features = [name for name, has in (("packed", cu_seqlens is not None), ("window", window is not None)) if has]
    sizes = {"B": B, "T": T, "S": k.shape[1], "Hq": Hq, "Hkv": k.shape[2], "K": K, "V": v.shape[-1]}
    call = describe_call(q, k, v, sizes=sizes, features=features)
    scale = K**-0.5 if scale is None else float(scale)
    return ATTENTION.choose(call, backend).run(q, k, v, cu_seqlens, cu_seqlens_k, scale, window)


def check_mla_heads(op: str, q_heads: int, q_dim: int, kv_b: Tensor, nope_dim: int, R: int, dr: int) -> None:
    """Raise ShapeError unless the query width and kv_b's rows fit nope_dim + dr and the head count."""
    if not 0 < nope_dim <= q_dim or q_dim != nope_dim + dr:
        raise ShapeError(
            f"{op}: q is {q_dim} wide, expected nope_dim + dr = {nope_dim} + {dr}; "
            "dr is the width of key_rope, nope_dim the rest."
        )
    expect_shape(op, "kv_b", kv_b, [None, R], "H * (dn + dv), R")
    rows = kv_b.shape[0]
    if rows % q_heads or rows // q_heads <= nope_dim:
        raise ShapeError(
            f"{op}: kv_b has {rows} rows, expected {q_heads} * (nope_dim + dv) with nope_dim = {nope_dim} and dv > 0."
        )


def mla_attention(
    q: Tensor,
    latent: Tensor,
    key_rope: Tensor,
    kv_b: Tensor,
    *,
    nope_dim: int,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Multi-head latent attention, expanded: keys and values of every head are computed from the latent.

        [k_n ; v]_{h,s} = W_h c_s,   o = attention(q, [k_n ; k_r], v)
        W_h: rows h * (dn + dv) on of kv_b, key rows first. k_r is one for all heads.
        Kimi Linear 48B-A3B (arXiv:2510.26692): dn = 128, dr = 64, dv = 128, R = 512, no rotation.

    Args:
        q: Queries, [B, T, H, dn + dr].
        latent: Normalised latents c, [B, S, R], S >= T.
        key_rope: The key part all heads share, [B, S, dr]; rotated by the caller where positions are used.
        kv_b: The expansion, [H * (dn + dv), R].
        nope_dim: dn.
        scale: Multiplies the scores. Default: (dn + dr) ** -0.5.
        cu_seqlens: As in `attention`.
        cu_seqlens_k: As in `attention`.
        backend: A backend of `attention`.

    Returns:
        [B, T, H, dv] in the dtype of q.

    Raises:
        ShapeError, DtypeError, DeviceError: An argument disagrees with the others; names it.

    Numerics: keys and values are rounded to the input's dtype; then as `attention`.
    Cost: S * R * H * (dn + dv) multiply-adds for the expansion, then `attention` at K = dn + dr, V = dv; it holds
        S * H * (2 * dn + dr + 2 * dv) elements. For one token a sequence, `mla_decode` expands nothing.

    Example:
        >>> import torch
        >>> q, c, r = torch.randn(1, 8, 2, 6), torch.randn(1, 8, 16), torch.randn(1, 8, 2)
        >>> mla_attention(q, c, r, torch.randn(2 * (4 + 5), 16), nope_dim=4).shape
        torch.Size([1, 8, 2, 5])
    """
    q, latent, key_rope, kv_b = cast_inputs(q, latent, key_rope, kv_b)
    expect_shape("mla_attention", "q", q, [None] * 4, "B, T, H, dn + dr")
    B, _, H, width = q.shape
    expect_shape("mla_attention", "latent", latent, [B, None, None], "B, S, R")
    S, R = latent.shape[1:]
    expect_shape("mla_attention", "key_rope", key_rope, [B, S, None], "B, S, dr")
    check_mla_heads("mla_attention", H, width, kv_b, nope_dim, R, key_rope.shape[-1])
    tensors = {"q": q, "latent": latent, "key_rope": key_rope, "kv_b": kv_b}
    expect_floating("mla_attention", **tensors)
    expect_same_dtype("mla_attention", **tensors)
    expect_same_device("mla_attention", **tensors)
    k, v = expand_latent(latent, key_rope, kv_b, H, nope_dim, "reference" if backend == "reference" else None)
    return attention(q, k, v, scale=scale, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, backend=backend)
