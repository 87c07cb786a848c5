"""The native kernels of the delta rule: forward and one-token step of `delta_rule` and of `kda_core`.

The equations are in csrc/delta.h. float32 or bfloat16 tensors, mixed as they come, contiguous; what else comes in is
copied. The forward hands the backward the state that enters every segment of `SEGMENT` tokens of every sequence.
"""

import itertools

import torch
from torch import Tensor

from kimi_linear.ops import native
from kimi_linear.ops.delta_rule.decode import refuse_gradients
from kimi_linear.ops.delta_rule.layout import read_cu_seqlens, wide_dtype
from kimi_linear.ops.registry import Call

# Tokens between two states that are kept for the backward; kSegment of csrc/delta.h.
SEGMENT = 256
_NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def plain(x: Tensor) -> Tensor:
    """Return a tensor as the kernels take it: contiguous, float32 or bfloat16."""
    return (x if x.dtype in _NATIVE_DTYPES else x.float()).contiguous()


def plain_or_none(x: Tensor | None) -> Tensor | None:
    """Return `plain` of a tensor that may be missing."""
    return None if x is None else plain(x)


def plain_float(x: Tensor | None) -> Tensor | None:
    """Return a parameter or a state as the kernels take it: contiguous float32."""
    return None if x is None else x.float().contiguous()


def type_word(*tensors: Tensor | None) -> int:
    """Return the word with a bit for each bfloat16 tensor, in the order of `TypeBit`."""
    return sum(1 << bit for bit, x in enumerate(tensors) if x is not None and x.dtype == torch.bfloat16)


def refuse_decode(call: Call) -> list[str]:
    """Refuse what the kernels do not compute, and gradients, for the calls in place."""
    return refuse_gradients(call) + native.refuse(call)


def segment_bound(cu_seqlens: Tensor | None, B: int, T: int) -> int:
    """Return how many segments all sequences have at most; exactly where they are equally long."""
    return B * -(-T // SEGMENT) if cu_seqlens is None else T // SEGMENT + cu_seqlens.shape[0] - 1


def sequences(cu_seqlens: Tensor | None, B: int, T: int) -> tuple[Tensor | None, int, int]:
    """Return (offsets as int64, number of sequences, number of segments of all of them)."""
    if cu_seqlens is None:
        return None, B, segment_bound(None, B, T)
    bounds = read_cu_seqlens(cu_seqlens, T)
    segments = sum(-(-(end - start) // SEGMENT) for start, end in itertools.pairwise(bounds))
    return cu_seqlens.to(torch.int64).contiguous(), len(bounds) - 1, segments


def _results(value: Tensor, sizes: tuple[int, int, int], segments: int, bound: int) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate o, the final states [N, HV, K, V] and the boundaries; `segments` of the latter will be written."""
    N, HV, K = sizes
    V = value.shape[3]
    boundaries = torch.empty(bound, HV, K, V)
    boundaries[segments:].zero_()
    return torch.empty_like(value), torch.empty(N, HV, K, V), boundaries


@torch.library.custom_op("kimi_linear::delta_rule_cpu", mutates_args=())
def delta_rule_cpu(
    q: Tensor,
    k: Tensor,
    erase_key: Tensor | None,
    write_value: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    read: str,
    beta: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (o, final states, boundaries); keep: these are wanted. See `kimi_linear.ops.delta_rule.delta_rule`.

    With beta [B, T, HV], and no erase key, this is beta k, and write_value is taken times beta; both row by row.
    """
    q, k, z, g = plain(q), plain(k), plain(write_value), plain(log_decay)
    e, beta = plain_or_none(erase_key), plain_or_none(beta)
    B, T, H, K = q.shape
    HV, V = z.shape[2:]
    offsets, N, segments = sequences(cu_seqlens, B, T)
    bound = segment_bound(cu_seqlens, B, T) if keep else 0
    o, final, boundaries = _results(z, (N, HV, K), segments, bound)
    native.kernel("delta_rule_forward", "pppppppppppiiiiiiiiiif")(
        q,
        k,
        e,
        z,
        g,
        beta,
        plain_float(initial_state),
        offsets,
        o,
        final,
        boundaries if keep else None,
        type_word(q, k, e, z, g, beta),
        N,
        T,
        H,
        HV,
        K,
        V,
        0 if e is None else e.shape[2],
        g.dim() == 3,
        read == "pre",
        scale,
    )
    return o.to(write_value.dtype), final.to(wide_dtype(write_value.dtype)), boundaries


@torch.library.custom_op("kimi_linear::kda_core_cpu", mutates_args=())
def kda_core_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float | None,
    beta_scale: float,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (o, final states, boundaries); keep: these are wanted. See `kimi_linear.ops.delta_rule.kda_core`."""
    value_dtype = v.dtype
    q, k, v, gate, beta = plain(q), plain(k), plain(v), plain(gate), plain(beta)
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    offsets, N, segments = sequences(cu_seqlens, B, T)
    bound = segment_bound(cu_seqlens, B, T) if keep else 0
    o, final, boundaries = _results(v, (N, HV, K), segments, bound)
    native.kernel("kda_core_forward", "ppppppppppppiiiiiiifff")(
        q,
        k,
        v,
        gate,
        beta,
        plain_float(A_log),
        plain_float(dt_bias),
        plain_float(initial_state),
        offsets,
        o,
        final,
        boundaries if keep else None,
        type_word(q, k, None, v, gate, beta),
        N,
        T,
        H,
        HV,
        K,
        V,
        lower_bound or 0.0,
        beta_scale,
        scale,
    )
    return o.to(value_dtype), final.to(wide_dtype(value_dtype)), boundaries


@delta_rule_cpu.register_fake
def _fake_delta_rule(
    q: Tensor,
    k: Tensor,
    erase_key: Tensor | None,
    write_value: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    read: str,
    beta: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_results(q, write_value, cu_seqlens, keep)


@kda_core_cpu.register_fake
def _fake_kda_core(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float | None,
    beta_scale: float,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_results(q, v, cu_seqlens, keep)


def _fake_results(q: Tensor, value: Tensor, cu_seqlens: Tensor | None, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    B, T, HV, V = value.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    states = value.new_empty(N, HV, q.shape[-1], V, dtype=wide_dtype(value.dtype))
    segments = segment_bound(cu_seqlens, B, T) if keep else 0
    boundaries = value.new_empty(segments, HV, q.shape[-1], V, dtype=torch.float32)
    return torch.empty_like(value, memory_format=torch.contiguous_format), states, boundaries


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def run_delta_rule(
    q: Tensor,
    k: Tensor,
    erase_key: Tensor | None,
    write_value: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    read: str,
    beta: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run `delta_rule_cpu`, keeping the boundaries where a gradient is needed."""
    keep = _needs_grad(q, k, erase_key, write_value, log_decay, initial_state, beta)
    o, final, _ = delta_rule_cpu(
        q, k, erase_key, write_value, log_decay, scale, initial_state, cu_seqlens, read, beta, keep
    )
    return o, final


def run_kda_core(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float | None,
    beta_scale: float,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run `kda_core_cpu`, keeping the boundaries where a gradient is needed."""
    keep = _needs_grad(q, k, v, gate, beta, A_log, dt_bias, initial_state)
    o, final, _ = kda_core_cpu(
        q, k, v, gate, beta, A_log, dt_bias, lower_bound, beta_scale, scale, initial_state, cu_seqlens, keep
    )
    return o, final
