"""One query a sequence against its cache, in csrc/attention_mla.cpp and attention_decode.cpp.

The cache is read once, in pieces that threads share, and never widened, copied or expanded. Strides of sequences and
tokens are free, so a view into a longer buffer costs nothing.
"""

import torch
from torch import Tensor

from kimi_linear.ops import native
from kimi_linear.ops.attention.decode_reference import _fake_attention_decode, _fake_mla_decode
from kimi_linear.ops.attention.lengths import check_lengths_values
from kimi_linear.ops.attention.paging import check_block_table_values
from kimi_linear.ops.native.library import DTYPES


def _caches(*caches: Tensor) -> list[Tensor]:
    """Return the caches in one dtype that the kernels read, with everything behind the token axis dense."""
    dtype = caches[0].dtype
    if dtype not in DTYPES or any(x.dtype != dtype for x in caches):
        caches = tuple(x.float() for x in caches)
    return [x if x[0, 0].is_contiguous() else x.contiguous() for x in caches] if caches[0].numel() else list(caches)


def _lengths(lengths: Tensor, cache: Tensor, block_table: Tensor | None) -> Tensor:
    """Return the lengths as the kernels read them, after the checks of values."""
    S = cache.shape[1] if block_table is None else cache.shape[1] * block_table.shape[1]
    values = lengths.tolist()
    if values and not 0 <= min(values) <= max(values) <= S:
        check_lengths_values(lengths, S)
    if block_table is not None:
        check_block_table_values(block_table, lengths, cache)
    return lengths.to(torch.int64).contiguous()


@torch.library.custom_op("kimi_linear::attention_decode_cpu", mutates_args=())
def attention_decode_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None,
    block_table: Tensor | None = None,
) -> Tensor:
    """Run grouped heads; arguments as in `attention_decode`, all given."""
    (N, Hq, K), (Hkv, V) = q.shape, v.shape[2:]
    ends = _lengths(lengths, k, block_table)
    k, v = _caches(k, v)
    o = q.new_empty(N, Hq, V)
    table = None if block_table is None else block_table.contiguous()
    pages, page_size = (0, 0) if table is None else (table.shape[1], k.shape[1])
    native.kernel("attention_decode", "ppppppiiiiiiiiiiiiiif")(
        *(q.contiguous(), k, v, ends, table, o, N, Hq, Hkv, K, V),
        *(k.stride(0), k.stride(1), v.stride(0), v.stride(1), pages, page_size),
        *(DTYPES[q.dtype], DTYPES[k.dtype], window or 0, scale),
    )
    return o


@torch.library.custom_op("kimi_linear::mla_decode_cpu", mutates_args=())
def mla_decode_cpu(
    q: Tensor,
    latent: Tensor,
    key_rope: Tensor,
    lengths: Tensor,
    kv_b: Tensor,
    nope_dim: int,
    scale: float,
    block_table: Tensor | None = None,
) -> Tensor:
    """Run absorbed latent attention; arguments as in `mla_decode`, all given."""
    (N, H, width), R = q.shape, latent.shape[2]
    ends = _lengths(lengths, latent, block_table)
    latent, key_rope = _caches(latent, key_rope)
    dv = kv_b.shape[0] // H - nope_dim
    o = q.new_empty(N, H, dv)
    table = None if block_table is None else block_table.contiguous()
    pages, page_size = (0, 0) if table is None else (table.shape[1], latent.shape[1])
    native.kernel("mla_decode", "pppppppiiiiiiiiiiiiiif")(
        *(q.contiguous(), latent, key_rope, ends, kv_b.contiguous(), table, o, N, H, R, nope_dim, width - nope_dim, dv),
        *(latent.stride(0), latent.stride(1), key_rope.stride(0), key_rope.stride(1), pages, page_size),
        *(DTYPES[q.dtype], DTYPES[latent.dtype], scale),
    )
    return o


attention_decode_cpu.register_fake(_fake_attention_decode)
mla_decode_cpu.register_fake(_fake_mla_decode)
