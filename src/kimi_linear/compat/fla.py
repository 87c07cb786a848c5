"""The call signatures of flash-linear-attention's delta-rule operators, on ours: change the import line, nothing else.

    from kimi_linear.compat.fla import chunk_kda          # was: from fla.ops.kda import chunk_kda

Argument names, order, defaults, return arity and dtypes follow flash-linear-attention 0.6. Differences on purpose:
empty packed sequences return their initial state; no input is ever modified; float64 works; unknown keyword arguments
warn instead of vanishing. States are [N, HV, K, V] unless `state_v_first` asks for [N, HV, V, K].
"""

import itertools
import warnings
from typing import Any

import torch
from torch import Tensor

from kimi_linear.base.errors import BackendError, ConfigError, ShapeError
from kimi_linear.ops.checks import expect_cu_seqlens, expect_shape
from kimi_linear.ops.delta_rule import gated_delta_rule, kda, kda_core
from kimi_linear.ops.delta_rule.layout import read_cu_seqlens, wide_dtype
from kimi_linear.ops.gate import forget_gate
from kimi_linear.ops.norm import l2_norm

# Arguments of serving engines: ignoring them with a warning would leave a state pool or an output as it was.
_REFUSED = {"ssm_state_indices", "inplace_final_state", "num_accepted_tokens", "out"}

__all__ = [
    "chunk_gated_delta_rule",
    "chunk_kda",
    "fused_kda_gate",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_kda",
]


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: Any = None,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    chunk_size: int = 64,
    **unknown: Any,
) -> tuple[Tensor | None, ...]:
    """Apply KDA to many tokens; see `kimi_linear.ops.kda` for the equation and the shapes.

    `safe_gate` is the caller's promise about the decay's range and changes nothing here; `disable_recompute`,
    `cu_seqlens_cpu` and `chunk_size` are hints that are not needed.

    Returns:
        (o, final_state or None), and with `return_intermediate_states` the state at the start of every `chunk_size`
        tokens of every sequence, [B, NT, HV, K, V] in k's dtype.

    Raises:
        ShapeError, DtypeError, ConfigError (each a ValueError): As `kimi_linear.ops.kda`, and for flags that contradict
            each other.

    Example:
        >>> import torch
        >>> x = torch.nn.functional.normalize(torch.randn(1, 5, 2, 8), dim=-1)
        >>> o, state = chunk_kda(x, x, x, -torch.rand(1, 5, 2, 8), torch.rand(1, 5, 2), output_final_state=True)
        >>> state.shape
        torch.Size([1, 2, 8, 8])
    """
    del disable_recompute, cu_seqlens_cpu
    state_v_first = _old_spellings("chunk_kda", state_v_first, unknown)
    _check_flags("chunk_kda", q, A_log, lower_bound, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    if chunk_size not in (32, 64):
        raise ConfigError(f"chunk_kda: chunk_size is {chunk_size}, expected 32 or 64.")
    if use_gate_in_kernel and safe_gate and (lower_bound is None or not -5 <= lower_bound < 0):
        raise ConfigError(f"chunk_kda: safe_gate needs lower_bound in [-5, 0), given {lower_bound}.")
    _refuse_context_parallel("chunk_kda", cp_context)
    inputs = (q, k, v, g, beta, A_log, dt_bias, initial_state)
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if return_intermediate_states and needs_grad:
        raise ConfigError("chunk_kda: return_intermediate_states is for inference; call it under torch.no_grad().")
    call: dict[str, Any] = {
        "scale": scale,
        "norm": use_qk_l2norm_in_kernel,
        "gate": use_gate_in_kernel,
        "sigmoid": use_beta_sigmoid_in_kernel,
        "neg_eigval": allow_neg_eigval,
        "lower_bound": lower_bound,
        "A_log": A_log,
        "dt_bias": dt_bias,
    }
    state = _from_v_first(initial_state, state_v_first)
    if return_intermediate_states:
        o, final, middle = _in_steps(q, k, v, g, beta, state, cu_seqlens, chunk_size, call)
        return o, _final(final, output_final_state, state_v_first), _swap(middle) if state_v_first else middle
    o, final = _kda(q, k, v, g, beta, state, cu_seqlens, **call)
    return o, _final(final, output_final_state, state_v_first)


def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **unknown: Any,
) -> tuple[Tensor, Tensor | None]:
    """Apply KDA, as `chunk_kda`; `beta` may also be a strength per value channel, [B, T, HV, V]. Differentiable."""
    state_v_first = _old_spellings("fused_recurrent_kda", state_v_first, unknown)
    op = "fused_recurrent_kda"
    _check_flags(op, q, A_log, lower_bound, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    run = _kda_per_channel if beta.dim() == v.dim() else _kda
    o, final = run(
        q,
        k,
        v,
        g,
        beta,
        _from_v_first(initial_state, state_v_first),
        cu_seqlens,
        scale=scale,
        norm=use_qk_l2norm_in_kernel,
        gate=use_gate_in_kernel,
        sigmoid=use_beta_sigmoid_in_kernel,
        neg_eigval=allow_neg_eigval,
        lower_bound=lower_bound,
        A_log=A_log,
        dt_bias=dt_bias,
    )
    return o, _final(final, output_final_state, state_v_first)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: Any = None,
    *,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    chunk_size: int = 64,
    **unknown: Any,
) -> tuple[Tensor, Tensor | None]:
    """Apply the gated delta rule with one decay a head, g [B, T, HV]; see `kimi_linear.ops.gated_delta_rule`.

    `cu_seqlens_cpu`, `chunk_indices` and `chunk_size` are hints that are not needed.
    """
    del cu_seqlens_cpu, chunk_indices
    op = "chunk_gated_delta_rule"
    state_v_first = _old_spellings(op, state_v_first, unknown)
    _check_flags(op, q, A_log, None, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    if chunk_size not in (16, 32, 64):
        raise ConfigError(f"{op}: chunk_size is {chunk_size}, expected 16, 32 or 64.")
    _refuse_context_parallel(op, cp_context)
    if use_gate_in_kernel:
        g = _gate_a_head(g, A_log, dt_bias)
    o, final = gated_delta_rule(
        l2_norm(q) if use_qk_l2norm_in_kernel else q,
        l2_norm(k) if use_qk_l2norm_in_kernel else k,
        v,
        g,
        _strength(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval),
        scale=scale,
        initial_state=_from_v_first(initial_state, state_v_first),
        cu_seqlens=cu_seqlens,
    )
    return o, _final(final, output_final_state, state_v_first)


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **unknown: Any,
) -> tuple[Tensor, Tensor | None]:
    """Apply the gated delta rule with a decay a head (`g`), a key channel (`gk`), or both. `gv` is not supported."""
    op = "fused_recurrent_gated_delta_rule"
    state_v_first = _old_spellings(op, state_v_first, unknown)
    if gv is not None:
        raise ConfigError(f"{op}: gv, a decay per value channel, is not supported; use g or gk.")
    _check_flags(op, q, A_log, None, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    if use_gate_in_kernel:
        if g is None:
            raise ConfigError(f"{op}: use_gate_in_kernel needs g, the gate's logits [B, T, HV].")
        g = _gate_a_head(g, A_log, dt_bias)
    strength = torch.ones_like(v[..., 0]) if beta is None else beta
    if beta is not None:
        strength = _strength(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    if g is None and gk is None:
        g = v.new_zeros(v.shape[:-1], dtype=torch.float32)
    decay = gk if g is None else g if gk is None else g.unsqueeze(-1) + gk
    assert decay is not None
    front = gated_delta_rule if decay.dim() == 3 else kda
    o, final = front(
        l2_norm(q) if use_qk_l2norm_in_kernel else q,
        l2_norm(k) if use_qk_l2norm_in_kernel else k,
        v,
        decay,
        strength,
        scale=scale,
        initial_state=_from_v_first(initial_state, state_v_first),
        cu_seqlens=cu_seqlens,
    )
    return o, _final(final, output_final_state, state_v_first)


def fused_kda_gate(
    g: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the log decay of gate logits g [.., HV, K]; see `kimi_linear.ops.forget_gate`."""
    if A_log is None and lower_bound is None:
        raise ConfigError(
            "fused_kda_gate: A_log is None, expected [HV] with the softplus gate; give it, or lower_bound."
        )
    A_log = None if A_log is None else A_log.flatten()
    return forget_gate(g, A_log, dt_bias, lower_bound=lower_bound).to(output_dtype)


def _gate_a_head(g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None) -> Tensor:
    """Return the log decay of gate logits g [B, T, HV], one a head."""
    A_log = None if A_log is None else A_log.flatten()
    # The last axis of one tells one decay a head from one a channel where there is no bias to tell.
    return forget_gate(g.unsqueeze(-1), A_log, None if dt_bias is None else dt_bias.flatten()).squeeze(-1)


def _kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    scale: float | None,
    norm: bool,
    gate: bool,
    sigmoid: bool,
    neg_eigval: bool,
    lower_bound: float | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    A_log = None if A_log is None else A_log.flatten()
    if norm and gate and sigmoid:
        return kda_core(
            q,
            k,
            v,
            g,
            beta,
            A_log,
            dt_bias,
            lower_bound=lower_bound,
            allow_neg_eigval=neg_eigval,
            scale=scale,
            initial_state=state,
            cu_seqlens=cu_seqlens,
        )
    decay = forget_gate(g, A_log, dt_bias, lower_bound=lower_bound) if gate else g
    strength = _strength(beta, sigmoid, neg_eigval)
    q, k = (l2_norm(q), l2_norm(k)) if norm else (q, k)
    return kda(q, k, v, decay, strength, scale=scale, initial_state=state, cu_seqlens=cu_seqlens)


def _kda_per_channel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    **call: Any,
) -> tuple[Tensor, Tensor]:
    """Run a strength per value channel by making every value channel a head of width one.

    Each channel then has a system of its own, as it must, and a copy of its head's decay: V times the memory of g.
    """
    B, T, HV, V = v.shape
    if beta.shape != v.shape:
        raise ShapeError(f"fused_recurrent_kda: beta is {list(beta.shape)}, expected {[B, T, HV]} or {list(v.shape)}.")
    if call["gate"]:
        A_log = None if call["A_log"] is None else call["A_log"].flatten()
        g = forget_gate(g, A_log, call["dt_bias"], lower_bound=call["lower_bound"])
        call = {**call, "gate": False, "A_log": None, "dt_bias": None}
    if state is not None:
        expect_shape("fused_recurrent_kda", "initial_state", state, (None, HV, q.shape[-1], V), "N, HV, K, V")
        state = state.permute(0, 1, 3, 2).reshape(-1, HV * V, state.shape[2], 1)
    o, final = _kda(
        q,
        k,
        v.reshape(B, T, HV * V, 1),
        g.repeat_interleave(V, 2),
        beta.reshape(B, T, HV * V),
        state,
        cu_seqlens,
        **call,
    )
    return o.view(B, T, HV, V), final.view(-1, HV, V, final.shape[2]).transpose(2, 3)


def _in_steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    step: int,
    call: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `step` tokens at a time and keep the state at every start: (o, final [N, ..], middle [B, NT, ..])."""
    bounds = [(0, v.shape[1])]
    sequences = v.shape[0]
    if cu_seqlens is not None:
        sequences = expect_cu_seqlens("chunk_kda", cu_seqlens, v.shape[0], v.device)
        bounds = list(itertools.pairwise(read_cu_seqlens(cu_seqlens, v.shape[1])))
    if state is None:
        state = v.new_zeros(sequences, v.shape[2], q.shape[3], v.shape[3], dtype=wide_dtype(v.dtype))
    expect_shape("chunk_kda", "initial_state", state, (sequences, v.shape[2], q.shape[3], v.shape[3]), "N, HV, K, V")
    outputs, finals, middle = [], [], []
    for n, (start, end) in enumerate(bounds):
        current = state if cu_seqlens is None else state[n : n + 1]
        for at in range(start, end, step):
            cut = slice(at, min(at + step, end))
            middle.append(current.to(k.dtype))
            o, current = _kda(q[:, cut], k[:, cut], v[:, cut], g[:, cut], beta[:, cut], current, None, **call)
            outputs.append(o)
        finals.append(current)
    empty = v.new_empty(v.shape[0], 0, v.shape[2], q.shape[3], v.shape[3], dtype=k.dtype)
    return (
        torch.cat(outputs, 1) if outputs else v.clone(),
        torch.cat(finals),
        torch.stack(middle, 1) if middle else empty,
    )


def _strength(beta: Tensor, sigmoid: bool, neg_eigval: bool) -> Tensor:
    if not sigmoid:
        return beta
    return beta.to(wide_dtype(beta.dtype)).sigmoid() * (2.0 if neg_eigval else 1.0)


def _swap(state: Tensor) -> Tensor:
    return state.transpose(-1, -2).contiguous()


def _from_v_first(state: Tensor | None, v_first: bool) -> Tensor | None:
    # A state that is no [N, HV, V, K] is left to the operator's check.
    return _swap(state) if state is not None and v_first and state.dim() == 4 else state


def _final(state: Tensor, wanted: bool, v_first: bool) -> Tensor | None:
    if not wanted:
        return None
    return _swap(state) if v_first else state


def _check_flags(
    op: str,
    q: Tensor,
    A_log: Tensor | None,
    lower_bound: float | None,
    gate: bool,
    sigmoid: bool,
    neg_eigval: bool,
) -> None:
    if gate and A_log is None and lower_bound is None:
        raise ConfigError(f"{op}: use_gate_in_kernel needs A_log [HV], or a lower_bound for the bounded gate.")
    if neg_eigval and not sigmoid:
        raise ConfigError(f"{op}: allow_neg_eigval doubles sigmoid(beta), so it needs use_beta_sigmoid_in_kernel.")
    if q.shape[-1] > 256:
        raise ShapeError(f"{op}: K is {q.shape[-1]}, expected at most 256.")


def _refuse_context_parallel(op: str, cp_context: Any) -> None:
    if cp_context is not None:
        raise BackendError(f"{op}: cp_context is not supported; split the sequence yourself and pass initial_state.")


def _old_spellings(op: str, v_first: bool, unknown: dict[str, Any]) -> bool:
    """Accept the old name of `state_v_first`, refuse layouts that are gone, warn about the rest."""
    if "transpose_state_layout" in unknown:
        if v_first:
            raise ConfigError(
                f"{op}: state_v_first and transpose_state_layout are one option; give only state_v_first."
            )
        warnings.warn(f"{op}: transpose_state_layout is now state_v_first.", DeprecationWarning, stacklevel=3)
        v_first = bool(unknown.pop("transpose_state_layout"))
    if unknown.pop("head_first", False):
        raise ConfigError(f"{op}: head_first is not supported; pass [B, T, H, K].")
    for name in sorted(_REFUSED & unknown.keys()):
        if unknown[name] is not None and unknown[name] is not False:
            raise ConfigError(
                f"{op}: {name} is not supported; for a pool of states use kimi_linear.ops.kda_core_decode."
            )
    if unknown:
        names = ", ".join(sorted(unknown))
        warnings.warn(f"{op}: ignoring unknown arguments {names}.", UserWarning, stacklevel=3)
    return v_first
