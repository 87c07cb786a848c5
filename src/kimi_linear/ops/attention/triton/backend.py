"""The `triton` backend of MLA decode, absorbed: when it can run, and its operator. Imports triton when it first runs.

Equations as in decode_tiled.py: torch multiplies the query into the latent space (Eq. 1) and the mixed latents out of
it (Eq. 3), and two launches do what lies between. A sequence's positions are cut into pieces, a program for each and
every block of heads, and the pieces are added in order.

Cutting depends on a sequence's own length alone, which the programs read themselves: nothing waits for the device, and
neither neighbours, nor the capacity of the cache, nor pages change a bit of what the launches give a sequence. For
Eq. 1 and 3 that is torch's promise to make: its batched products may round differently for another number of sequences.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kimi_linear.ops.attention.decode_reference import _fake_mla_decode
from kimi_linear.ops.attention.lengths import check_lengths_values
from kimi_linear.ops.attention.paging import check_block_table_values
from kimi_linear.ops.autocast import without_autocast
from kimi_linear.ops.registry import Call
from kimi_linear.ops.triton.backend import refuse_device

# Channels of the latent, and of the shared key part, that a program can hold.
MOST_LATENT, MOST_ROPE = 512, 64
# Positions a program takes, as long as MOST_PIECES of them are enough for the sequence; multiples of it beyond.
PIECE, MOST_PIECES = 512, 64
# Pieces a program of the sum takes at a time, and its channels.
_GROUP, _CHANNELS = 16, 128


@dataclass(frozen=True)
class Tiles:
    """What a program holds: heads, positions, channels of the latent in a product of the scores; warps, and stages."""

    heads: int
    tokens: int
    channels: int
    warps: int
    stages: int


def refuse(call: Call) -> list[str]:
    """Refuse what the kernels do not compute."""
    reasons = refuse_device(call)
    if call.sizes.get("R", 0) > MOST_LATENT:
        reasons.append(f"R is above {MOST_LATENT}")
    if call.sizes.get("dr", 0) > MOST_ROPE:
        reasons.append(f"dr is above {MOST_ROPE}")
    return reasons


def pieces(S: int) -> int:
    """Return into how many pieces a sequence is cut at most, in a cache of S positions."""
    return min(-(-S // PIECE), MOST_PIECES)


def workspace_bytes(N: int, H: int, R: int, S: int) -> int:
    """Return the bytes of the pieces' results: N sequences, H heads, R channels, room for S positions each."""
    return 4 * N * pieces(S) * H * (R + 2)


def tiles(H: int, R: int, work: torch.dtype) -> Tiles:
    """Return the tiles of a call by the working dtype of its products; never by N, so that neighbours change no bit."""
    from kimi_linear.ops.triton.launch import padded

    RP = padded(R)
    if work == torch.float32:
        # Three products of tf32 hold each operand twice in registers.
        return Tiles(heads=16, tokens=16, channels=min(64, RP), warps=8, stages=1)
    # Masks of the channels take the registers of 16 heads.
    heads = 32 if R == RP or RP <= 256 else 16
    return Tiles(heads=min(heads, padded(H)), tokens=64, channels=RP, warps=8, stages=2)


def work_dtype(query: torch.dtype, cache: torch.dtype) -> torch.dtype:
    """Return the dtype of the operands of products: one that holds query and cache as they are, or bfloat16."""
    if torch.float32 in (query, cache):
        return torch.float32
    return query if query == cache else torch.bfloat16


def attend(
    absorbed: Tensor,
    query_rope: Tensor,
    latent: Tensor,
    key_rope: Tensor,
    lengths: Tensor,
    scale: float,
    table: Tensor | None,
) -> Tensor:
    """Return the mixed latents, [H, N, R], in the dtype of the query: Eq. 2, and the sum of Eq. 3.

    Args:
        absorbed: K_h^T q_n, [N, H, R]; its last axis dense, as are those of the other floating tensors.
        query_rope: q_r, [N, H, dr].
        latent: [N, S, R], or with a table [P, page_size, R].
        key_rope: [N, S, dr], or with a table [P, page_size, dr].
        lengths: [N].
        scale: Multiplies the scores.
        table: Pages of each sequence, [N, max_pages], contiguous.
    """
    from kimi_linear.ops.attention.triton.kernels import LANGUAGE_DTYPES, join_kernel, piece_kernel
    from kimi_linear.ops.triton.launch import padded, start

    (N, H, R), dr = absorbed.shape, key_rope.shape[-1]
    page = 0 if table is None else latent.shape[1]
    S = latent.shape[1] if table is None else table.shape[1] * page
    work, count = work_dtype(absorbed.dtype, latent.dtype), pieces(S)
    t = tiles(H, R, work)
    tops, sums = (absorbed.new_empty(N, count, H, dtype=torch.float32) for _ in range(2))
    mixed = absorbed.new_empty(N, count, H, R, dtype=torch.float32)
    start(
        *(piece_kernel, -(-H // t.heads) * count * N),
        *(absorbed, query_rope, latent, key_rope, lengths, table, tops, sums, mixed),
        # Powers of two from here on.
        scale * math.log2(math.e),
        *(S, H, 0 if table is None else table.shape[1], latent.shape[0], count),
        *(*absorbed.stride()[:2], *query_rope.stride()[:2], *latent.stride()[:2], *key_rope.stride()[:2]),
        R=R,
        DR=dr,
        RP=padded(R),
        DP=padded(dr),
        PAGE=page,
        BH=t.heads,
        BN=t.tokens,
        BR=t.channels,
        PIECE=PIECE,
        MOST=MOST_PIECES,
        WORK=LANGUAGE_DTYPES[work],
        num_warps=t.warps,
        num_stages=t.stages,
    )
    o = absorbed.new_empty(H, N, R)
    channels = min(_CHANNELS, padded(R))
    start(
        *(join_kernel, H * N * -(-R // channels), tops, sums, mixed, lengths, o, S, N, H, count),
        R=R,
        BR=channels,
        G=_GROUP,
        PIECE=PIECE,
        MOST=MOST_PIECES,
        num_warps=4,
    )
    return o


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("kimi_linear::mla_decode_triton", mutates_args=())
def mla_decode_triton(
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
    S = latent.shape[1] * (1 if block_table is None else block_table.shape[1])
    check_lengths_values(lengths, S)
    if block_table is not None:
        check_block_table_values(block_table, lengths, latent)
        block_table = block_table.contiguous()
    if latent.dtype != key_rope.dtype or latent.dtype == torch.float64:
        latent, key_rope = latent.float(), key_rope.float()
    weights = kv_b.unflatten(0, (q.shape[1], -1))
    with without_autocast(q.device):
        # Eq. 1, a batch over heads: [N, H, R]
        absorbed = torch.bmm(q[..., :nope_dim].transpose(0, 1), weights[:, :nope_dim]).transpose(0, 1)
        queries, caches = (absorbed, _dense(q[..., nope_dim:])), (_dense(latent), _dense(key_rope))
        mixed = attend(*queries, *caches, lengths.contiguous(), scale, block_table)
        # Eq. 3, [H, N, dv]
        return torch.bmm(mixed, weights[:, nope_dim:].transpose(1, 2)).transpose(0, 1).contiguous()


mla_decode_triton.register_fake(_fake_mla_decode)
