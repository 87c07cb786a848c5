"""The named members of the family: each says what erase key, write value and decay are, and calls `delta_rule`.

Products with a gate are taken in float32 (float64 for float64 inputs) and handed on unrounded.
"""

from torch import Tensor

from kimi_linear.base.errors import ShapeError
from kimi_linear.ops.checks import expect_floating, expect_same_device, expect_shape
from kimi_linear.ops.delta_rule.api import (
    Read,
    apply,
    check_inputs,
    check_pool,
    check_read,
    delta_rule,
    delta_rule_decode,
)
from kimi_linear.ops.delta_rule.layout import weighed


def _check(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    scalar: bool,
) -> None:
    """Raise the error for the first argument that disagrees, under the front's name, or that is for another front."""
    check_inputs(op, q, k, None, v, log_decay, initial_state, cu_seqlens, value="v")
    if scalar and log_decay.dim() == 4:
        raise ShapeError(
            f"{op}: log_decay is {list(log_decay.shape)}, expected {list(v.shape[:-1])} (B, T, HV); for a decay per "
            "channel use kda or gdn2."
        )
    if not scalar and log_decay.dim() == 3:
        raise ShapeError(
            f"{op}: log_decay is {list(log_decay.shape)}, expected {[*v.shape[:-1], k.shape[-1]]} (B, T, HV, K); for "
            "one decay a head use gated_delta_rule."
        )


def _check_strength(op: str, name: str, strength: Tensor, v: Tensor, letters: str = "B, T, HV") -> None:
    expect_floating(op, **{name: strength})
    expect_shape(op, name, strength, v.shape[:-1], letters)
    expect_same_device(op, v=v, **{name: strength})


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply Kimi Delta Attention: the delta rule with a decay per key channel.

        S_t = (I - beta_t k_t k_t^T) Diag(exp(log_decay_t)) S_{t-1} + beta_t k_t v_t^T
        o_t = scale * S_t^T q_t
        Kimi Linear, arXiv:2510.26692, Eq. 1; here log_decay = log(alpha).

    Args:
        q: Queries, [B, T, H, K]. Normalised by the caller.
        k: Keys, [B, T, H, K], unit L2 norm over K (unchecked: costs a pass).
        v: Values, [B, T, HV, V]; HV must be a multiple of H.
        log_decay: Natural log of the decay, [B, T, HV, K], every entry <= 0.
        beta: Write strength, [B, T, HV], in (0, 1), or (0, 2) for negative eigenvalues.
        scale, initial_state, cu_seqlens, backend: As for `delta_rule`.

    Returns:
        Output [B, T, HV, V] in the dtype of v, and the final state [N, HV, K, V] in float32.

    Raises:
        ShapeError, DtypeError, DeviceError, BackendError: As for `delta_rule`.

    Cost: that of `delta_rule`; the backends but `cpu` form beta k and beta v first, in float32.

    Example:
        >>> import torch
        >>> q, k = (torch.nn.functional.normalize(torch.randn(1, 5, 2, 8), dim=-1) for _ in range(2))
        >>> o, state = kda(q, k, torch.randn(1, 5, 2, 8), -torch.rand(1, 5, 2, 8), torch.rand(1, 5, 2))
        >>> state.shape
        torch.Size([1, 2, 8, 8])
    """
    _check("kda", q, k, v, log_decay, initial_state, cu_seqlens, scalar=False)
    _check_strength("kda", "beta", beta, v)
    o, state = apply(q, k, None, v, log_decay, beta, scale, initial_state, cu_seqlens, "post", backend)
    return o.to(v.dtype), state


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply the gated delta rule with one decay a head, log_decay [B, T, HV]; otherwise as `kda`.

        S_t = exp(log_decay_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
        Gated DeltaNet, arXiv:2412.06464.

    Example:
        >>> import torch
        >>> k = torch.nn.functional.normalize(torch.randn(1, 5, 2, 8), dim=-1)
        >>> o, state = gated_delta_rule(k, k, torch.randn(1, 5, 4, 8), -torch.rand(1, 5, 4), torch.rand(1, 5, 4))
        >>> o.shape
        torch.Size([1, 5, 4, 8])
    """
    _check("gated_delta_rule", q, k, v, log_decay, initial_state, cu_seqlens, scalar=True)
    _check_strength("gated_delta_rule", "beta", beta, v)
    o, state = apply(q, k, None, v, log_decay, beta, scale, initial_state, cu_seqlens, "post", backend)
    return o.to(v.dtype), state


def gated_delta_rule_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    pool: Tensor,
    slots: Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Advance `gated_delta_rule` (log_decay [N, HV]) or `kda` (log_decay [N, HV, K]) by one token, in place.

    Args:
        q: Queries, [N, H, K].
        k: Keys, [N, H, K].
        v: Values, [N, HV, V].
        log_decay: [N, HV] or [N, HV, K].
        beta: [N, HV].
        pool: States, [S, HV, K, V], float32 or bfloat16; updated in place.
        slots: Row of the pool of each sequence, [N]; -1: skip, its output is zero.
        scale: Factor on q. Default: K ** -0.5.
        backend: As for `delta_rule_decode`.

    Returns:
        Output [N, HV, V] in the dtype of v.

    Raises:
        ShapeError, DtypeError, DeviceError, BackendError: As for `delta_rule_decode`.

    Example:
        >>> import torch
        >>> k = torch.nn.functional.normalize(torch.randn(2, 1, 8), dim=-1)
        >>> pool, slots = torch.zeros(3, 1, 8, 4), torch.tensor([2, 0])
        >>> v, log_decay, beta = torch.randn(2, 1, 4), -torch.rand(2, 1), torch.rand(2, 1)
        >>> gated_delta_rule_decode(k, k, v, log_decay, beta, pool, slots).shape
        torch.Size([2, 1, 4])
    """
    op = "gated_delta_rule_decode"
    check_inputs(op, q, k, None, v, log_decay, None, None, lead="N", value="v")
    _check_strength(op, "beta", beta, v, "N, HV")
    check_pool(op, q, v, pool, slots)
    o = delta_rule_decode(
        q, k, weighed(k, beta), weighed(v, beta), log_decay, pool, slots, scale=scale, backend=backend
    )
    return o.to(v.dtype)


def gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    erase_gate: Tensor,
    write_gate: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply Gated DeltaNet-2: separate gates for what is erased and what is written.

        S_t = (I - k_t (b_t * k_t)^T) Diag(exp(log_decay_t)) S_{t-1} + k_t (w_t * v_t)^T
        Gated DeltaNet-2, arXiv:2605.22791.

    Args:
        q: Queries, [B, T, H, K].
        k: Keys, [B, T, H, K], unit L2 norm over K.
        v: Values, [B, T, HV, V].
        log_decay: [B, T, HV, K], every entry <= 0.
        erase_gate: b, [B, T, H, K] or [B, T, HV, K], in (0, 1).
        write_gate: w, [B, T, HV, V], in (0, 1).
        scale, initial_state, cu_seqlens, backend: As for `delta_rule`.

    Returns:
        Output [B, T, HV, V] in the dtype of v, and the final state [N, HV, K, V] in float32.

    Raises:
        ShapeError, DtypeError, DeviceError, BackendError: As for `delta_rule`.

    Example:
        >>> import torch
        >>> k = torch.nn.functional.normalize(torch.randn(1, 5, 2, 8), dim=-1)
        >>> b, w = torch.rand(1, 5, 2, 8), torch.rand(1, 5, 2, 4)
        >>> o, state = gdn2(k, k, torch.randn(1, 5, 2, 4), -torch.rand(1, 5, 2, 8), b, w)
        >>> o.shape
        torch.Size([1, 5, 2, 4])
    """
    _check("gdn2", q, k, v, log_decay, initial_state, cu_seqlens, scalar=False)
    expect_floating("gdn2", erase_gate=erase_gate, write_gate=write_gate)
    expect_shape("gdn2", "write_gate", write_gate, v.shape, "B, T, HV, V")
    heads = k.shape[2] if erase_gate.dim() == 4 and erase_gate.shape[2] == k.shape[2] else v.shape[2]
    expect_shape("gdn2", "erase_gate", erase_gate, (*k.shape[:2], heads, k.shape[3]), "B, T, H or HV, K")
    expect_same_device("gdn2", v=v, erase_gate=erase_gate, write_gate=write_gate)
    o, state = delta_rule(
        q,
        k,
        weighed(k, erase_gate),
        weighed(v, write_gate),
        log_decay,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    return o.to(v.dtype), state


def comba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    erase_strength: Tensor,
    *,
    read: Read = "pre",
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply Comba: the erase reads the state before its decay, with a strength of its own.

        S_t = (alpha_t I - b_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T         read="pre", "SPLR"
        Comba, arXiv:2506.02475. The output correction o = S^T (q - delta k) is the caller's: pass q - delta k as q.

    Args:
        q: Queries, [B, T, H, K], corrected by the caller.
        k: Keys, [B, T, H, K], unit L2 norm over K.
        v: Values, [B, T, HV, V].
        log_decay: log alpha, [B, T, HV], every entry <= 0.
        beta: Write strength, [B, T, HV].
        erase_strength: b, [B, T, HV].
        read: "pre", or "post" for the "IPLR" variant.
        scale, initial_state, cu_seqlens, backend: As for `delta_rule`.

    Returns:
        Output [B, T, HV, V] in the dtype of v, and the final state [N, HV, K, V] in float32.

    Raises:
        ShapeError, DtypeError, DeviceError, BackendError: As for `delta_rule`.

    Example:
        >>> import torch
        >>> k = torch.nn.functional.normalize(torch.randn(1, 5, 2, 8), dim=-1)
        >>> log_decay, beta = -torch.rand(1, 5, 2), torch.rand(1, 5, 2)
        >>> o, state = comba(k, k, torch.randn(1, 5, 2, 4), log_decay, beta, 0.7 * beta)
        >>> o.shape
        torch.Size([1, 5, 2, 4])
    """
    _check("comba", q, k, v, log_decay, initial_state, cu_seqlens, scalar=True)
    _check_strength("comba", "beta", beta, v)
    _check_strength("comba", "erase_strength", erase_strength, v)
    check_read("comba", read)
    o, state = delta_rule(
        q,
        k,
        weighed(k, erase_strength),
        weighed(v, beta),
        log_decay,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        read=read,
        backend=backend,
    )
    return o.to(v.dtype), state


def ssd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply the recurrence that erases nothing: Mamba-2's SSD for a decay a head, GLA for a decay per channel.

        S_t = Diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T,    o_t = scale * S_t^T q_t
        Mamba-2, arXiv:2405.21060, with q = C, k = B, v = dt x, log_decay = dt A; scale 1.

    Args:
        q: C, [B, T, H, K].
        k: B, [B, T, H, K].
        v: dt x, [B, T, HV, V].
        log_decay: dt A, [B, T, HV] or [B, T, HV, K], every entry <= 0.
        scale: Factor on q. Default: 1.
        initial_state, cu_seqlens, backend: As for `delta_rule`.

    Returns:
        Output [B, T, HV, V] in the dtype of v, and the final state [N, HV, K, V] in float32.

    Raises:
        ShapeError, DtypeError, DeviceError, BackendError: As for `delta_rule`.

    Example:
        >>> import torch
        >>> C, B = torch.randn(1, 5, 1, 8), torch.randn(1, 5, 1, 8)
        >>> o, state = ssd(C, B, torch.randn(1, 5, 4, 16), -torch.rand(1, 5, 4))
        >>> state.shape
        torch.Size([1, 4, 8, 16])
    """
    check_inputs("ssd", q, k, None, v, log_decay, initial_state, cu_seqlens, value="v")
    return delta_rule(
        q,
        k,
        None,
        v,
        log_decay,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
