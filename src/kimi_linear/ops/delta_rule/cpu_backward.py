"""The native kernels' backward of `delta_rule` and `kda_core`: backward operators, fake kernels, autograd formulas.

The equations are in csrc/delta_backward.h. Beside the inputs a backward needs the states that the forward keeps for it,
one every `SEGMENT` tokens of a sequence. Beside its results it allocates the gradients of q, k and of an erase key of
their heads once more, float32 and a row a value head, where value heads are grouped, and nothing else that grows with
the number of tokens; a thread holds two to three megabytes at K = V = 128.
"""

from typing import Any

import torch
from torch import Tensor

from kimi_linear.ops import native
from kimi_linear.ops.delta_rule.autograd import fake_backward, saved_inputs
from kimi_linear.ops.delta_rule.cpu import (
    delta_rule_cpu,
    kda_core_cpu,
    plain,
    plain_float,
    sequences,
    type_word,
)

_FLOAT32, _BFLOAT16 = 0, 1


def _code(x: Tensor) -> int:
    return _BFLOAT16 if x.dtype == torch.bfloat16 else _FLOAT32


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x


def _target(x: Tensor, HV: int) -> Tensor:
    """Return where the kernel writes the gradient of x [B, T, heads, K]: like x, or a row for every value head."""
    B, T, heads, K = x.shape
    return torch.empty_like(x) if heads == HV else torch.empty(B, T, HV, K)


def _group_sum(x: Tensor, given: Tensor, normalised: bool) -> Tensor:
    """Sum x [B, T, HV, K] into the heads of `given`, then back through the norm of `given` if x is of that."""
    if x.shape == given.shape:
        return x
    B, T, H, K = given.shape
    total = torch.empty_like(given)
    raw = given if normalised else None
    native.kernel("delta_rule_sum_groups", "pppiiiii")(
        x, raw, total, _code(given), _code(total), B * T * H, x.shape[2] // H, K
    )
    return total


@torch.library.custom_op("kimi_linear::delta_rule_cpu_backward", mutates_args=())
def delta_rule_cpu_backward(
    d_o: Tensor,
    d_final: Tensor,
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
    boundaries: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of (q, k, erase_key or empty, write_value, log_decay, initial state, beta or empty)."""
    given = (q, k, _or_empty(erase_key, q), write_value, log_decay, _or_empty(beta, q))
    q, k, e, z, g, b = (plain(x) for x in given)
    (B, T, H, K), (HV, V) = q.shape, z.shape[2:]
    offsets, N, _ = sequences(cu_seqlens, B, T)
    d_q, d_k, d_z, d_g, d_b = _target(q, HV), _target(k, HV), *(torch.empty_like(x) for x in (z, g, b))
    d_e = torch.empty_like(e) if erase_key is None else _target(e, HV)
    d_initial = torch.empty(N, HV, K, V)
    native.kernel("delta_rule_backward", "pppppppppppppppppiiiiiiiiiiif")(
        d_o.to(z.dtype).contiguous(),
        plain_float(d_final),
        q,
        k,
        e,
        z,
        g,
        None if beta is None else b,
        boundaries,
        offsets,
        d_q,
        d_k,
        d_e,
        d_z,
        d_g,
        d_b,
        d_initial,
        type_word(q, k, e, z, g, b),
        type_word(d_q, d_k, d_e),
        N,
        T,
        H,
        HV,
        K,
        V,
        0 if erase_key is None else e.shape[2],
        g.dim() == 3,
        read == "pre",
        scale,
    )
    d_q, d_k = _group_sum(d_q, q, False), _group_sum(d_k, k, False)
    d_e = d_e if erase_key is None else _group_sum(d_e, e, False)
    found = [d_x.to(x.dtype) for d_x, x in zip((d_q, d_k, d_e, d_z, d_g, d_b), given, strict=True)]
    return found[0], found[1], found[2], found[3], found[4], d_initial, found[5]


@torch.library.custom_op("kimi_linear::kda_core_cpu_backward", mutates_args=())
def kda_core_cpu_backward(
    d_o: Tensor,
    d_final: Tensor,
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
    boundaries: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of (q, k, v, gate, beta, A_log or empty, dt_bias or empty, initial state)."""
    given = (q, k, v, gate, beta)
    q, k, v, gate, beta = (plain(x) for x in given)
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    offsets, N, _ = sequences(cu_seqlens, B, T)
    d_q, d_k, d_v, d_x, d_beta = _target(q, HV), _target(k, HV), *(torch.empty_like(x) for x in (v, gate, beta))
    d_A_log = torch.zeros(0 if A_log is None else HV)
    d_dt_bias = torch.zeros((0,) if dt_bias is None else dt_bias.shape)
    d_initial = torch.empty(N, HV, K, V)
    grads = (d_q, d_k, d_v, d_x, d_beta, None if A_log is None else d_A_log, None if dt_bias is None else d_dt_bias)
    inputs = (q, k, v, gate, beta, plain_float(A_log), plain_float(dt_bias), boundaries, offsets)
    types = (type_word(q, k, None, v, gate, beta), type_word(d_q, d_k))
    numbers = (lower_bound or 0.0, beta_scale, scale)
    native.kernel("kda_core_backward", "pppppppppppppppppppiiiiiiiifff")(
        d_o.to(v.dtype).contiguous(),
        plain_float(d_final),
        *inputs,
        *grads,
        d_initial,
        *types,
        N,
        T,
        H,
        HV,
        K,
        V,
        *numbers,
    )
    d_q, d_k = _group_sum(d_q, q, True), _group_sum(d_k, k, True)
    found = [d_y.to(y.dtype) for d_y, y in zip((d_q, d_k, d_v, d_x, d_beta), given, strict=True)]
    return (  # type: ignore[return-value]
        *found,
        d_A_log if A_log is None else d_A_log.to(A_log.dtype),
        d_dt_bias if dt_bias is None else d_dt_bias.to(dt_bias.dtype),
        d_initial,
    )


@delta_rule_cpu_backward.register_fake
def _fake_backward(d_o: Tensor, d_final: Tensor, q: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, beta, _boundaries = rest
    like_beta = torch.empty_like(_or_empty(beta, q), memory_format=torch.contiguous_format)
    return *fake_backward(d_o, d_final, q, *rest), like_beta


@kda_core_cpu_backward.register_fake
def _fake_core_backward(
    d_o: Tensor,
    d_final: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    empty = q.new_empty(0, dtype=torch.float32)
    inputs = (q, k, v, gate, beta, empty if A_log is None else A_log, empty if dt_bias is None else dt_bias, d_final)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keep the call's tensors and the states at the segments' starts; `keep` itself is dropped."""
    inputs = (*inputs[:-1], output[2])
    ctx.tensors = [isinstance(x, Tensor) for x in inputs]
    ctx.plain = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))


def _delta_rule_formula(ctx: Any, d_o: Tensor, d_final: Tensor, _: Tensor) -> tuple[Any, ...]:
    inputs = saved_inputs(ctx)
    d_q, d_k, d_e, d_z, d_g, d_state, d_b = delta_rule_cpu_backward(d_o, d_final, *inputs)
    erase, initial, beta = inputs[2], inputs[6], inputs[9]
    d_erase, d_initial, d_beta = (
        None if x is None else d_x for x, d_x in ((erase, d_e), (initial, d_state), (beta, d_b))
    )
    return d_q, d_k, d_erase, d_z, d_g, None, d_initial, None, None, d_beta, None


def _kda_core_formula(ctx: Any, d_o: Tensor, d_final: Tensor, _: Tensor) -> tuple[Any, ...]:
    inputs = saved_inputs(ctx)
    *found, d_A_log, d_dt_bias, d_state = kda_core_cpu_backward(d_o, d_final, *inputs)
    A_log, dt_bias, initial = inputs[5], inputs[6], inputs[10]
    parameters = (None if A_log is None else d_A_log, None if dt_bias is None else d_dt_bias)
    return (*found, *parameters, None, None, None, None if initial is None else d_state, None, None)


delta_rule_cpu.register_autograd(_delta_rule_formula, setup_context=_save)
kda_core_cpu.register_autograd(_kda_core_formula, setup_context=_save)
