"""Speculative decoding without snapshots: verify a draft from the committed states, then replay what was accepted.

    o, trace = kda_core_verify(q, k, v, gate, beta, A_log, dt_bias, pool, slots)
    accepted = ...                                          # [N], from the logits of o
    delta_rule_replay(trace, accepted, pool, slots)

What a token writes depends on the tokens before it alone, so the accepted prefix of the trace is exact, whatever was
drafted after it. A token costs 4 (HV K + H K + HV V) bytes of trace: at K = V = 128 and H = HV 1,536 bytes a head,
where a state has 65,536. Kimi Linear, arXiv:2510.26692, Eq. 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kimi_linear.base.errors import DtypeError
from kimi_linear.ops.checks import describe_call, expect_integer, expect_same_device, expect_shape
from kimi_linear.ops.delta_rule import verify_torch
from kimi_linear.ops.delta_rule.api import Read, check_heads, check_inputs, check_pool, check_read, check_values
from kimi_linear.ops.delta_rule.core import check_core
from kimi_linear.ops.delta_rule.decode import refuse_gradients
from kimi_linear.ops.delta_rule.fronts import weighed
from kimi_linear.ops.delta_rule.triton import backend as triton
from kimi_linear.ops.delta_rule.triton import verify as triton_verify
from kimi_linear.ops.gate import forget_gate
from kimi_linear.ops.norm import l2_norm
from kimi_linear.ops.registry import Backend, Call, define
from kimi_linear.ops.triton.backend import untried

WIDE = (torch.float32, torch.float64)


class Trace(NamedTuple):
    """What T draft tokens of N sequences do to their states, S <- D_t S + k_t w_t^T; float32 (float64 for float64).

    All zero for a sequence without a slot.
    """

    # Diag D_t, [N, T, HV, K], or [N, T, HV] for one decay a head.
    decay: Tensor
    # k_t, normalised where the operator normalises, [N, T, H, K].
    key: Tensor
    # w_t, the write value minus what the erase key read, [N, T, HV, V].
    written: Tensor


def _refuse_gradients(call: Call) -> list[str]:
    return ["verifies a draft, which has no gradient; use the many-token call"] if call.needs_grad else []


def _refuse_triton(call: Call) -> list[str]:
    return _refuse_gradients(call) + triton.refuse(call)


def _composition(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the definition: the plain operators one after the other."""
    log_decay = forget_gate(gate, A_log, dt_bias, lower_bound=lower_bound, backend="reference")
    strength = beta_scale * beta.to(log_decay.dtype).sigmoid()
    q, k = (l2_norm(x, backend="reference") for x in (q, k))
    erase, value = weighed(k, strength), weighed(v, strength)
    run = verify_torch.delta_rule_verify_reference
    o, *trace = run(q, k, erase, value, log_decay, pool, slots, scale, "post")
    return o.to(v.dtype), *trace


_CHUNK, _REFERENCE = "one chunk of all draft tokens, any device", "token by token, for checking"
DELTA_RULE_VERIFY = define(
    "delta_rule_verify",
    Backend("triton", triton_verify.delta_rule_verify_triton, _refuse_triton, "one launch on a GPU", untried),
    Backend("chunk", verify_torch.delta_rule_verify_chunk, _refuse_gradients, _CHUNK),
    Backend("reference", verify_torch.delta_rule_verify_reference, _refuse_gradients, _REFERENCE),
)
KDA_CORE_VERIFY = define(
    "kda_core_verify",
    Backend("triton", triton_verify.kda_core_verify_triton, _refuse_triton, "one launch on a GPU", untried),
    Backend("chunk", verify_torch.kda_core_verify_chunk, _refuse_gradients, _CHUNK),
    Backend("reference", _composition, _refuse_gradients, "the plain operators, one after the other"),
)
DELTA_RULE_REPLAY = define(
    "delta_rule_replay",
    Backend("triton", triton_verify.delta_rule_replay_triton, triton.refuse_decode, "one launch, in place", untried),
    Backend("chunk", verify_torch.delta_rule_replay_chunk, refuse_gradients, "one product, in place, any device"),
    Backend("reference", verify_torch.delta_rule_replay_reference, refuse_gradients, _REFERENCE),
)


def delta_rule_verify(
    q: Tensor,
    k: Tensor,
    erase_key: Tensor | None,
    write_value: Tensor,
    log_decay: Tensor,
    pool: Tensor,
    slots: Tensor,
    *,
    scale: float | None = None,
    read: Read = "post",
    backend: str | None = None,
) -> tuple[Tensor, Trace]:
    """Run T draft tokens a sequence from the states of a pool, which are left as they are; see `delta_rule`.

    Args:
        q: Queries, [N, T, H, K].
        k: Keys, [N, T, H, K].
        erase_key: [N, T, H, K], [N, T, HV, K] or None.
        write_value: [N, T, HV, V].
        log_decay: [N, T, HV, K] or [N, T, HV].
        pool: Committed states, [S, HV, K, V], float32 or bfloat16 (float64 for float64 inputs).
        slots: Row of the pool of each sequence, [N], int32 or int64; -1: skip, its output and trace are zero.
        scale: Factor on q. Default: K ** -0.5.
        read: As for `delta_rule`.
        backend: "triton", "chunk", "reference", or None.

    Returns:
        Output [N, T, HV, V] in the dtype of write_value, and the trace that `delta_rule_replay` takes.

    Raises:
        ShapeError, DtypeError, DeviceError, BackendError: As for `delta_rule_decode`.

    Numerics: float32 (float64 for float64); a bfloat16 state is widened, never rounded between the tokens.
    Cost: "triton": each state is read once; no workspace beside the results. "chunk": the same products as one chunk of
        T tokens, T^2 scores a head. On a GPU the host reads no value, so the call may be captured in a CUDA graph; a
        slot outside of the pool is then skipped. 4 (HV K + H K + HV V) bytes of trace a token.

    Example:
        >>> import torch
        >>> k = torch.nn.functional.normalize(torch.randn(2, 3, 1, 8), dim=-1)
        >>> pool, slots = torch.zeros(3, 1, 8, 4), torch.tensor([2, 0])
        >>> o, trace = delta_rule_verify(k, k, k, torch.randn(2, 3, 1, 4), -torch.rand(2, 3, 1, 8), pool, slots)
        >>> o.shape, trace.written.shape
        (torch.Size([2, 3, 1, 4]), torch.Size([2, 3, 1, 4]))
    """
    op = "delta_rule_verify"
    check_inputs(op, q, k, erase_key, write_value, log_decay, None, None, lead="N, T")
    check_read(op, read)
    check_pool(op, q, write_value, pool, slots)
    check_values(op, log_decay)
    tensors = (q, k, erase_key, write_value, log_decay, pool)
    run = DELTA_RULE_VERIFY.choose(_describe(k, write_value, *tensors), backend).run
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    o, *trace = run(q, k, erase_key, write_value, log_decay, pool, slots, scale, read)
    return o, Trace(*trace)


def kda_core_verify(
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
) -> tuple[Tensor, Trace]:
    """Run T draft tokens a sequence of `kda_core` from the states of a pool, which are left as they are.

    Args:
        q: Raw queries, [N, T, H, K].
        k: Raw keys, [N, T, H, K].
        v: Values, [N, T, HV, V].
        gate: Logits of the forget gate, [N, T, HV, K].
        beta: Logits of the write strength, [N, T, HV].
        A_log: [HV] or None.
        dt_bias: [HV * K] or None.
        pool: Committed states, [S, HV, K, V], float32 or bfloat16.
        slots: Row of the pool of each sequence, [N]; -1: skip, its output and trace are zero.
        lower_bound, allow_neg_eigval, scale: As for `kda_core`.
        backend: "triton", "chunk", "reference", or None.

    Returns:
        Output [N, T, HV, V] in the dtype of v, and the trace that `delta_rule_replay` takes.

    Raises:
        ShapeError, DtypeError, DeviceError, ConfigError: As for `kda_core`.
        BackendError: As for `kda_core`, and when a gradient is needed.

    Numerics, cost: as for `delta_rule_verify`.

    Example:
        >>> import torch
        >>> q, k, gate = (torch.randn(2, 3, 1, 8) for _ in range(3))
        >>> v, beta, pool = torch.randn(2, 3, 1, 4), torch.randn(2, 3, 1), torch.zeros(3, 1, 8, 4)
        >>> slots, accepted = torch.tensor([2, -1]), torch.tensor([1, 0])
        >>> o, trace = kda_core_verify(q, k, v, gate, beta, torch.zeros(1), torch.zeros(8), pool, slots)
        >>> delta_rule_replay(trace, accepted, pool, slots)
        >>> [bool(state.any()) for state in pool]
        [False, False, True]
    """
    op = "kda_core_verify"
    check_core(op, q, k, v, gate, beta, A_log, dt_bias, lower_bound, "N, T")
    check_pool(op, q, v, pool, slots)
    run = KDA_CORE_VERIFY.choose(_describe(k, v, q, k, v, gate, beta, A_log, dt_bias, pool), backend).run
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    strength = 2.0 if allow_neg_eigval else 1.0
    o, *trace = run(q, k, v, gate, beta, A_log, dt_bias, pool, slots, lower_bound, strength, scale)
    return o, Trace(*trace)


def delta_rule_replay(
    trace: Trace, accepted: Tensor, pool: Tensor, slots: Tensor, *, backend: str | None = None
) -> None:
    """Advance the states of a pool by the first accepted tokens of a trace, in place.

        S <- Diag(decay_t) S + key_t written_t^T,   t < accepted

    Args:
        trace: What the verification returned for the same pool and slots.
        accepted: Tokens to take of each sequence, [N], int32 or int64, 0 to T. 0 leaves a state bit-identical.
        pool: States, [S, HV, K, V], float32 or bfloat16 (float64 for a trace in float64); the rows named by `slots` are
            overwritten, all others stay bit-identical.
        slots: Row of the pool of each sequence, [N], no row twice; -1: skip.
        backend: "triton", "chunk", "reference", or None.

    Raises:
        ShapeError, DtypeError, DeviceError: An argument disagrees. On a GPU the values of `accepted` and `slots` are
            not looked at: there `accepted` is taken to lie within 0 and T, and a slot outside of the pool is skipped.
        BackendError: As for `delta_rule_decode`.

    Numerics: float32 (float64). In a float32 pool "triton" and, after `delta_rule_verify`, "reference" leave the bits
        that their one-token calls leave after the same tokens ("triton" as tested by its interpreter); the others
        differ in the last ones. A bfloat16 state is rounded once a call, however many tokens are accepted.
    Cost: each state with an accepted token is read and written once ("triton"), or passed over a few times.

    Example: see `kda_core_verify`.
    """
    op = "delta_rule_replay"
    decay, key, written = trace
    _check_trace(op, trace)
    check_pool(op, key, written, pool, slots)
    expect_shape(op, "accepted", accepted, slots.shape, "N")
    expect_integer(op, "accepted", accepted)
    expect_same_device(op, key=key, accepted=accepted)
    run = DELTA_RULE_REPLAY.choose(_describe(key, written, key, decay, written, pool), backend).run
    run(decay, key, written, accepted, pool, slots)


def _check_trace(op: str, trace: Trace) -> None:
    """Raise the error for a trace whose parts disagree."""
    decay, key, written = trace
    expect_shape(op, "trace.key", key, (None,) * 4, "N, T, H, K")
    expect_shape(op, "trace.written", written, (*key.shape[:2], None, None), "N, T, HV, V")
    check_heads(op, key.shape[2], written.shape[2], key.shape[3])
    shape = written.shape[:3] if decay.dim() == 3 else (*written.shape[:3], key.shape[3])
    expect_shape(op, "trace.decay", decay, shape, "N, T, HV, K; or [N, T, HV] for one decay a head")
    named = {"trace.key": key, "trace.decay": decay, "trace.written": written}
    for name, x in named.items():
        if x.dtype not in WIDE or x.dtype != key.dtype:
            raise DtypeError(f"{op}: {name} is {x.dtype}, expected torch.float32 (or torch.float64), all three alike.")
    expect_same_device(op, **named)


def _describe(k: Tensor, value: Tensor, *tensors: Tensor | None) -> Call:
    """Describe a call to the registry; the first of the tensors gives device and dtype."""
    (N, T, H, K), (HV, V) = k.shape, value.shape[2:]
    main, *others = tensors
    assert main is not None
    return describe_call(main, *others, sizes={"N": N, "T": T, "H": H, "HV": HV, "K": K, "V": V})
