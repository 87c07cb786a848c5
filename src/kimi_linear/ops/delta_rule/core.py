"""The form a KDA layer calls: raw queries and keys, gate logits and write strength logits go in, all else is inside."""

from torch import Tensor

from kimi_linear.base.errors import ConfigError
from kimi_linear.ops import native
from kimi_linear.ops.checks import (
    describe_call,
    expect_cu_seqlens,
    expect_floating,
    expect_same_device,
    expect_shape,
)
from kimi_linear.ops.delta_rule import cpu, cpu_decode
from kimi_linear.ops.delta_rule.api import check_heads, check_pool, check_state_dtype
from kimi_linear.ops.delta_rule.core_chunk import kda_core_chunk, kda_core_decode_chunk
from kimi_linear.ops.delta_rule.decode import refuse_gradients
from kimi_linear.ops.delta_rule.fronts import gated_delta_rule_decode, kda
from kimi_linear.ops.delta_rule.triton import backend as triton
from kimi_linear.ops.gate import forget_gate
from kimi_linear.ops.norm import l2_norm
from kimi_linear.ops.registry import Backend, Call, define
from kimi_linear.ops.triton.backend import untried


def _composition(
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
    """Run the definition: the plain operators one after the other."""
    log_decay = forget_gate(gate, A_log, dt_bias, lower_bound=lower_bound, backend="reference")
    strength = beta_scale * beta.to(log_decay.dtype).sigmoid()
    q, k = (l2_norm(x, backend="reference") for x in (q, k))
    return kda(
        q,
        k,
        v,
        log_decay,
        strength,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        backend="reference",
    )


def _composition_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    lower_bound: float | None,
    beta_scale: float,
    scale: float,
) -> Tensor:
    log_decay = forget_gate(gate, A_log, dt_bias, lower_bound=lower_bound, backend="reference")
    strength = beta_scale * beta.to(log_decay.dtype).sigmoid()
    q, k = (l2_norm(x, backend="reference") for x in (q, k))
    return gated_delta_rule_decode(q, k, v, log_decay, strength, pool, slots, scale=scale, backend="reference")


def _any(call: Call) -> list[str]:
    return []


KDA_CORE = define(
    "kda_core",
    Backend("cpu", cpu.run_kda_core, native.refuse, "native chunks of 16 tokens, gates formed row by row"),
    Backend("triton", triton.run_kda_core, triton.refuse, "two launches on a GPU, gates formed inside", untried),
    Backend("chunk", kda_core_chunk, _any, "tiled chunks in plain PyTorch, gates formed tile by tile"),
    Backend("reference", _composition, _any, "the plain operators, one after the other"),
)
KDA_CORE_DECODE = define(
    "kda_core_decode",
    Backend("cpu", cpu_decode.kda_core_decode_cpu, cpu.refuse_decode, "native, one pass over each state, in place"),
    Backend("triton", triton.kda_core_decode_triton, triton.refuse_decode, "one launch on a GPU, in place", untried),
    Backend("chunk", kda_core_decode_chunk, refuse_gradients, "one call, in place"),
    Backend("reference", _composition_decode, refuse_gradients, "the plain operators, one after the other"),
)


def kda_core(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    *,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply Kimi Delta Attention from the layer's raw projections.

        q, k <- x / sqrt(sum x^2 + 1e-6)          per head, over K
        log_decay = -exp(A_log) softplus(gate + dt_bias), or lower_bound * sigmoid(exp(A_log) (gate + dt_bias))
        strength  = sigmoid(beta), or twice that
        o, state  = kda(q, k, v, log_decay, strength)
        Kimi Linear, arXiv:2510.26692, §4.

    Args:
        q: Raw queries, [B, T, H, K].
        k: Raw keys, [B, T, H, K].
        v: Values, [B, T, HV, V]; HV must be a multiple of H.
        gate: Logits of the forget gate, [B, T, HV, K].
        beta: Logits of the write strength, [B, T, HV].
        A_log: Log of the decay's rate, [HV], float32. None: rate 1 (bounded gate only).
        dt_bias: Added to the gate's logits, [HV * K], float32, or None.
        lower_bound: Chooses the bounded gate; every log decay then lies in (lower_bound, 0). Default: the softplus
            gate, the one the released 48B weights need. It is another parameterisation, not a clamp.
        allow_neg_eigval: Write strength 2 sigmoid(beta), in (0, 2).
        scale: Factor on the normalised q. Default: K ** -0.5.
        initial_state: [N, HV, K, V], float32. Default: zeros.
        cu_seqlens: Token offsets of packed sequences, [N + 1]; needs B == 1.
        backend: "cpu", "triton", "chunk", "reference", or None.

    Returns:
        Output [B, T, HV, V] in the dtype of v, and the final state [N, HV, K, V] in float32.

    Raises:
        ShapeError, DtypeError, DeviceError, BackendError: As for `delta_rule`.
        ConfigError: A lower bound that is not negative, or no A_log with the softplus gate.

    Numerics: norms, gates and state in float32 whatever the inputs; A_log and dt_bias get gradients in their own dtype.
    Cost: that of `delta_rule`; the backward keeps only the raw inputs.

    Example:
        >>> import torch
        >>> q, k, gate = (torch.randn(1, 5, 2, 8) for _ in range(3))
        >>> v, beta = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2)
        >>> o, state = kda_core(q, k, v, gate, beta, torch.zeros(2), torch.zeros(16))
        >>> o.shape
        torch.Size([1, 5, 2, 8])
    """
    op = "kda_core"
    check_core(op, q, k, v, gate, beta, A_log, dt_bias, lower_bound, "B, T")
    N = q.shape[0] if cu_seqlens is None else expect_cu_seqlens(op, cu_seqlens, q.shape[0], q.device)
    sizes = {"N": N, "T": q.shape[1], "H": q.shape[2], "HV": v.shape[2], "K": q.shape[3], "V": v.shape[3]}
    if initial_state is not None:
        expect_shape(op, "initial_state", initial_state, (N, v.shape[2], q.shape[3], v.shape[3]), "N, HV, K, V")
        expect_same_device(op, q=q, initial_state=initial_state)
        check_state_dtype(op, "initial_state", initial_state, v)
    call = describe_call(
        q, k, v, gate, beta, A_log, dt_bias, initial_state, sizes=sizes, features=_features(cu_seqlens)
    )
    run = KDA_CORE.choose(call, backend).run
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    strength = 2.0 if allow_neg_eigval else 1.0
    o, state = run(q, k, v, gate, beta, A_log, dt_bias, lower_bound, strength, scale, initial_state, cu_seqlens)
    return o, state


def kda_core_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    *,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Advance `kda_core` by one token a sequence, in place on a pool of states.

    Args:
        q: Raw queries, [N, H, K].
        k: Raw keys, [N, H, K].
        v: Values, [N, HV, V].
        gate: Logits of the forget gate, [N, HV, K].
        beta: Logits of the write strength, [N, HV].
        A_log: [HV] or None.
        dt_bias: [HV * K] or None.
        pool: States, [S, HV, K, V], float32 or bfloat16; the rows named by `slots` are overwritten, all others stay
            bit-identical.
        slots: Row of the pool of each sequence, [N]; -1: skip, its output is zero.
        lower_bound, allow_neg_eigval, scale, backend: As for `kda_core`.

    Returns:
        Output [N, HV, V] in the dtype of v.

    Raises:
        ShapeError, DtypeError, DeviceError, ConfigError: As for `kda_core`.
        BackendError: As for `kda_core`, and when a gradient is needed.

    Example:
        >>> import torch
        >>> q, k, gate = (torch.randn(2, 1, 8) for _ in range(3))
        >>> v, beta, pool = torch.randn(2, 1, 4), torch.randn(2, 1), torch.zeros(3, 1, 8, 4)
        >>> o = kda_core_decode(q, k, v, gate, beta, torch.zeros(1), torch.zeros(8), pool, torch.tensor([2, -1]))
        >>> o[1]
        tensor([[0., 0., 0., 0.]])
    """
    op = "kda_core_decode"
    check_core(op, q, k, v, gate, beta, A_log, dt_bias, lower_bound, "N")
    check_pool(op, q, v, pool, slots)
    sizes = {"N": q.shape[0], "H": q.shape[1], "HV": v.shape[1], "K": q.shape[2], "V": v.shape[2]}
    call = describe_call(q, k, v, gate, beta, A_log, dt_bias, pool, sizes=sizes)
    run = KDA_CORE_DECODE.choose(call, backend).run
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    strength = 2.0 if allow_neg_eigval else 1.0
    o: Tensor = run(q, k, v, gate, beta, A_log, dt_bias, pool, slots, lower_bound, strength, scale)
    return o


def _features(cu_seqlens: Tensor | None) -> list[str]:
    return [] if cu_seqlens is None else ["packed"]


def check_core(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float | None,
    lead: str,
) -> None:
    """Raise the error for the first argument that disagrees; `lead` names the leading axes."""
    expect_floating(op, q=q, k=k, v=v, gate=gate, beta=beta, A_log=A_log, dt_bias=dt_bias)
    axes = lead.count(",") + 1
    expect_shape(op, "q", q, (None,) * (axes + 2), f"{lead}, H, K")
    rows, (H, K) = q.shape[:axes], q.shape[axes:]
    expect_shape(op, "k", k, (*rows, H, K), f"{lead}, H, K")
    expect_shape(op, "v", v, (*rows, None, None), f"{lead}, HV, V")
    HV = v.shape[axes]
    check_heads(op, H, HV, K)
    expect_shape(op, "gate", gate, (*rows, HV, K), f"{lead}, HV, K")
    expect_shape(op, "beta", beta, (*rows, HV), f"{lead}, HV")
    if A_log is not None:
        expect_shape(op, "A_log", A_log, (HV,), "HV")
    if dt_bias is not None:
        expect_shape(op, "dt_bias", dt_bias, (HV * K,), "HV * K")
    if lower_bound is not None and not lower_bound < 0:
        raise ConfigError(f"{op}: lower_bound is {lower_bound}, expected a negative number or None.")
    if lower_bound is None and A_log is None:
        raise ConfigError(f"{op}: A_log is None, expected [HV] with the softplus gate; give it, or a lower_bound.")
    expect_same_device(op, q=q, k=k, v=v, gate=gate, beta=beta, A_log=A_log, dt_bias=dt_bias)
