"""The delta rule for many tokens, and for one token in place: check the call, choose a backend, run it."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from kimi_linear.base import env
from kimi_linear.base.errors import ConfigError, DtypeError, KimiLinearError, ShapeError
from kimi_linear.ops import native
from kimi_linear.ops.checks import (
    describe_call,
    expect_cu_seqlens,
    expect_floating,
    expect_integer,
    expect_same_device,
    expect_shape,
)

# cpu_backward gives the operators of cpu their gradients.
from kimi_linear.ops.delta_rule import chunk, cpu, cpu_backward, cpu_decode, decode, reference  # noqa: F401
from kimi_linear.ops.delta_rule.layout import weighed, wide_dtype
from kimi_linear.ops.delta_rule.triton import backend as triton
from kimi_linear.ops.registry import Backend, Call, define
from kimi_linear.ops.triton.backend import untried

Read = Literal["post", "pre"]


def _weighed(run: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return a backend that takes a strength beta too: erase key beta k, write value times beta, formed beforehand."""

    def run_weighed(
        q: Tensor, k: Tensor, erase_key: Tensor | None, value: Tensor, log_decay: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        *others, beta = rest
        if beta is not None:
            erase_key, value = weighed(k, beta), weighed(value, beta)
        return run(q, k, erase_key, value, log_decay, *others)

    return run_weighed


DELTA_RULE = define(
    "delta_rule",
    Backend("cpu", cpu.run_delta_rule, native.refuse, "native chunks of 16 tokens"),
    Backend("triton", triton.run_delta_rule, triton.refuse, "two launches on a GPU", untried),
    Backend("chunk", _weighed(chunk.delta_rule_chunk), lambda call: [], "tiled chunks in plain PyTorch, any device"),
    Backend("reference", _weighed(reference.delta_rule_reference), lambda call: [], "token by token, for checking"),
)
DELTA_RULE_DECODE = define(
    "delta_rule_decode",
    Backend("cpu", cpu_decode.delta_rule_decode_cpu, cpu.refuse_decode, "native, one pass over each state, in place"),
    Backend("triton", triton.delta_rule_decode_triton, triton.refuse_decode, "one launch on a GPU, in place", untried),
    Backend("chunk", decode.delta_rule_decode_chunk, decode.refuse_gradients, "batched products, in place"),
    Backend("reference", decode.delta_rule_decode_reference, decode.refuse_gradients, "the recurrence, in place"),
)


def delta_rule(
    q: Tensor,
    k: Tensor,
    erase_key: Tensor | None,
    write_value: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    read: Read = "post",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply the gated delta rule with a separate erase key and write value: the one recurrence of the family.

        D_t = Diag(exp(log_decay_t))
        S_t = (I - k_t erase_key_t^T) D_t S_{t-1} + k_t write_value_t^T               read="post"
        S_t = D_t S_{t-1} - k_t (S_{t-1}^T erase_key_t)^T + k_t write_value_t^T       read="pre"
        o_t = scale * S_t^T q_t

    With erase_key = beta k and write_value = beta v this is Kimi Delta Attention, arXiv:2510.26692, Eq. 1 (chunked
    form Eqs. 6-9); Gated DeltaNet, GDN-2, Comba, GLA and Mamba-2 are other choices of the inputs (see the fronts).

    Args:
        q: Queries, [B, T, H, K]. Normalised by the caller.
        k: Keys, the direction written, [B, T, H, K].
        erase_key: The direction read before the write, [B, T, H, K] or [B, T, HV, K]; None: nothing is erased.
        write_value: What is written, [B, T, HV, V]; HV is a multiple of H; value head h reads key head h // (HV/H).
        log_decay: Natural log of the decay, [B, T, HV, K], or [B, T, HV] for one decay a head. Every entry <= 0
            (checked when KIMI_LINEAR_DEBUG is set); -1000 is fine.
        scale: Factor on q. Default: K ** -0.5.
        initial_state: [N, HV, K, V], float32 (float64 for float64 inputs). Default: zeros.
        cu_seqlens: Token offsets of packed sequences, [N + 1], int32 or int64, first 0 and last T; needs B == 1. Empty
            sequences are allowed and end in their initial state.
        read: Whether the erase key reads the state after its decay ("post") or before ("pre").
        backend: "cpu", "triton", "chunk", "reference", or None for the best that supports the call.

    Returns:
        Output [B, T, HV, V] in the dtype of write_value, and the final states [N, HV, K, V] in float32.

    Raises:
        ShapeError, DtypeError, DeviceError: An argument disagrees; names it, what it is and what it should be.
        BackendError: The named backend cannot run this call; lists every backend with its reasons.

    Numerics: accumulates in float32 (float64 for float64 inputs); every exponent formed is <= 0.
    Cost: about 3 T HV K V multiply-adds forward. Memory beside the results: a tile of bounded size, and in the backward
        a state every 32 to 1024 / HV tokens (at K = V = 128); see README.md. "reference" keeps every state.

    Example:
        >>> import torch
        >>> q = k = torch.nn.functional.normalize(torch.randn(1, 5, 2, 8), dim=-1)
        >>> o, state = delta_rule(q, k, 0.5 * k, torch.randn(1, 5, 2, 4), -torch.rand(1, 5, 2, 8))
        >>> o.shape, state.shape
        (torch.Size([1, 5, 2, 4]), torch.Size([1, 2, 8, 4]))
    """
    check_inputs("delta_rule", q, k, erase_key, write_value, log_decay, initial_state, cu_seqlens)
    check_read("delta_rule", read)
    return apply(q, k, erase_key, write_value, log_decay, None, scale, initial_state, cu_seqlens, read, backend)


def apply(
    q: Tensor,
    k: Tensor,
    erase_key: Tensor | None,
    value: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    read: Read,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Run `delta_rule` on checked arguments. With beta [B, T, HV]: erase key beta k, write value beta value."""
    check_values("delta_rule", log_decay)
    call = describe("delta_rule", q, k, erase_key, value, log_decay, beta, initial_state, cu_seqlens, read)
    run = DELTA_RULE.choose(call, backend).run
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    o, final_state = run(q, k, erase_key, value, log_decay, scale, initial_state, cu_seqlens, read, beta)
    return o, final_state


def delta_rule_decode(
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
) -> Tensor:
    """Advance one token a sequence, in place, on a pool of states addressed by slot; see `delta_rule`.

    Args:
        q: Queries, [N, H, K].
        k: Keys, [N, H, K].
        erase_key: [N, H, K], [N, HV, K] or None.
        write_value: [N, HV, V].
        log_decay: [N, HV, K] or [N, HV].
        pool: States, [S, HV, K, V], float32, or bfloat16 for half the memory (float64 for float64 inputs); the rows
            named by `slots` are overwritten, all others stay bit-identical.
        slots: Row of the pool of each sequence, [N], int32 or int64, no row twice; -1: skip, its output is zero.
        scale: Factor on q. Default: K ** -0.5.
        read: As for `delta_rule`.
        backend: "cpu", "triton", "chunk", "reference", or None.

    Returns:
        Output [N, HV, V] in the dtype of write_value.

    Raises:
        ShapeError, DtypeError, DeviceError, BackendError: As for `delta_rule`; BackendError too when a gradient is
            needed, because an update in place has none.

    Numerics: as for `delta_rule`; a bfloat16 state is widened, advanced in float32 and rounded once, to nearest, where
        it is stored. Errors of that rounding add up over as many tokens as the decay remembers; see README.md.
    Cost: about 3 N HV K V multiply-adds, a few passes over the named states. "triton" updates them where they lie, as
        do the others consecutive slots in order on the CPU; else these, and always for bfloat16, copy them out and
        back. On a GPU the host looks at no value, so a slot outside of the pool is skipped instead of refused.

    Example:
        >>> import torch
        >>> k = torch.nn.functional.normalize(torch.randn(2, 1, 8), dim=-1)
        >>> pool = torch.zeros(3, 1, 8, 4)
        >>> o = delta_rule_decode(k, k, k, torch.randn(2, 1, 4), -torch.rand(2, 1, 8), pool, torch.tensor([2, 0]))
        >>> o.shape
        torch.Size([2, 1, 4])
    """
    op = "delta_rule_decode"
    check_inputs(op, q, k, erase_key, write_value, log_decay, None, None, lead="N")
    check_read(op, read)
    check_pool(op, q, write_value, pool, slots)
    check_values(op, log_decay)
    (N, H, K), (HV, V) = q.shape, write_value.shape[1:]
    sizes = {"N": N, "H": H, "HV": HV, "K": K, "V": V}
    call = describe_call(q, k, erase_key, write_value, log_decay, pool, sizes=sizes)
    run = DELTA_RULE_DECODE.choose(call, backend).run
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    o: Tensor = run(q, k, erase_key, write_value, log_decay, pool, slots, scale, read)
    return o


def check_read(op: str, read: str) -> None:
    """Raise ConfigError unless the read convention is one of the two."""
    if read not in ("post", "pre"):
        raise ConfigError(f"{op}: read is {read!r}, expected 'post' (after the decay) or 'pre' (before it).")


def check_inputs(
    op: str,
    q: Tensor,
    k: Tensor,
    erase_key: Tensor | None,
    write_value: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    lead: str = "B, T",
    value: str = "write_value",
) -> None:
    """Raise the error for the first argument whose shape, dtype or device disagrees.

    `lead` names the leading axes, `value` the argument that holds the write value.
    """
    expect_floating(op, q=q, k=k, erase_key=erase_key, log_decay=log_decay, **{value: write_value})
    axes = lead.count(",") + 1
    expect_shape(op, "q", q, (None,) * (axes + 2), f"{lead}, H, K")
    rows, (H, K) = q.shape[:axes], q.shape[axes:]
    expect_shape(op, "k", k, (*rows, H, K), f"{lead}, H, K")
    expect_shape(op, value, write_value, (*rows, None, None), f"{lead}, HV, V")
    HV, V = write_value.shape[axes:]
    check_heads(op, H, HV, K)
    if erase_key is not None:
        heads = H if erase_key.dim() == axes + 2 and erase_key.shape[axes] == H else HV
        expect_shape(op, "erase_key", erase_key, (*rows, heads, K), f"{lead}, H or HV, K")
    if log_decay.dim() == axes + 1:
        expect_shape(op, "log_decay", log_decay, (*rows, HV), f"{lead}, HV")
    else:
        one = f"{lead}, HV, K; or [{lead}, HV] for one decay a head"
        expect_shape(op, "log_decay", log_decay, (*rows, HV, K), one)
    others = {"erase_key": erase_key, value: write_value, "log_decay": log_decay, "initial_state": initial_state}
    expect_same_device(op, q=q, k=k, **others)
    N = rows[0] if cu_seqlens is None else expect_cu_seqlens(op, cu_seqlens, rows[0], q.device)
    if initial_state is not None:
        expect_shape(op, "initial_state", initial_state, (N, HV, K, V), "N, HV, K, V")
        check_state_dtype(op, "initial_state", initial_state, write_value)


def check_heads(op: str, H: int, HV: int, K: int) -> None:
    """Raise ShapeError unless there are heads, in groups of one size, with at least one channel."""
    if H == 0 or HV == 0 or HV % H:
        raise ShapeError(f"{op}: HV is {HV} and H is {H}, expected HV to be a multiple of H, both at least 1.")
    if K == 0:
        raise ShapeError(f"{op}: K is 0, expected at least one channel.")


def check_state_dtype(op: str, name: str, state: Tensor, value: Tensor) -> None:
    """Raise DtypeError unless a state is float32, or float64 beside float64 inputs."""
    expected = wide_dtype(value.dtype)
    if state.dtype != expected:
        raise DtypeError(f"{op}: {name} is {state.dtype}, expected {expected}; states are never kept in less.")


def check_pool(op: str, q: Tensor, value: Tensor, pool: Tensor, slots: Tensor) -> None:
    """Raise the error for a pool of states, or slots, that do not fit queries [N, .., K] and values [N, .., HV, V]."""
    expect_shape(op, "pool", pool, (None, value.shape[-2], q.shape[-1], value.shape[-1]), "S, HV, K, V")
    expect_shape(op, "slots", slots, (q.shape[0],), "N")
    expect_integer(op, "slots", slots)
    expect_same_device(op, q=q, pool=pool, slots=slots)
    expected = wide_dtype(value.dtype)
    if pool.dtype != expected and (expected, pool.dtype) != (torch.float32, torch.bfloat16):
        or_less = " or torch.bfloat16" if expected == torch.float32 else ""
        raise DtypeError(f"{op}: pool is {pool.dtype}, expected {expected}{or_less}.")


def check_values(op: str, log_decay: Tensor) -> None:
    """Under KIMI_LINEAR_DEBUG, raise unless every log decay is <= 0; costs a pass over it and a device sync."""
    if torch.compiler.is_compiling() or not env.read("KIMI_LINEAR_DEBUG"):
        return
    # NaN fails the comparison too.
    if not bool((log_decay <= 0).all()):
        raise KimiLinearError(
            f"{op}: log_decay holds {float(log_decay.max())}, expected natural logs of decays, every one <= 0; "
            "negate it, or take its log, if it holds rates or decays."
        )


def describe(
    op: str,
    q: Tensor,
    k: Tensor,
    erase_key: Tensor | None,
    value: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    read: str,
) -> Call:
    """Describe a call to the registry."""
    B, T, H, K = q.shape
    HV, V = value.shape[2:]
    features = [
        name
        for name, present in (
            ("packed", cu_seqlens is not None),
            ("scalar_decay", log_decay.dim() == 3),
            ("no_erase", erase_key is None and beta is None),
            ("pre_read", read == "pre"),
            ("initial_state", initial_state is not None),
        )
        if present
    ]
    sizes = {"B": B, "T": T, "H": H, "HV": HV, "K": K, "V": V}
    tensors = (k, erase_key, value, log_decay, beta, initial_state)
    return describe_call(q, *tensors, sizes=sizes, features=features)
