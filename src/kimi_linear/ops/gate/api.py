"""The forget gate: check the call, bring it to [M, HV, K], choose a backend, run it."""

from torch import Tensor

from kimi_linear.base.errors import ConfigError, ShapeError
from kimi_linear.ops.checks import describe_call, expect_floating, expect_same_device, expect_shape
from kimi_linear.ops.gate import cpu, reference
from kimi_linear.ops.native import refuse
from kimi_linear.ops.registry import Backend, define

FORGET_GATE = define(
    "forget_gate",
    Backend("cpu", cpu.forget_gate_cpu, refuse, "native, one pass over memory each way"),
    Backend("reference", reference.forget_gate_reference, lambda call: [], "a few passes in plain PyTorch, any device"),
)


def forget_gate(
    x: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    *,
    lower_bound: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Turn gate logits into the natural log of the decay.

        softplus:  log_decay = -exp(A_log) softplus(x + dt_bias)                   lower_bound=None
        bounded:   log_decay = lower_bound sigmoid(exp(A_log) (x + dt_bias))       lower_bound < 0
        The first is the gate of Kimi Linear, arXiv:2510.26692, and, one a head, of Gated DeltaNet, arXiv:2412.06464.
        The two are different parameterisations, not one and its clamp: a model runs with the one it was trained with.

    Args:
        x: Logits, [..., HV, K], or [..., HV] for one decay a head.
        A_log: Log of the rate of each head, [HV]. None: a rate of one, in the bounded form only.
        dt_bias: [HV * K], head after head, or [HV] with one decay a head, which is what tells the two forms apart.
            None: no bias, x is [..., HV, K]; give x as [..., HV, 1] for one decay a head.
        lower_bound: The least log decay of the bounded form, < 0; None: the softplus form.
        backend: "cpu", "reference", or None for the best that supports the call.

    Returns:
        log_decay, the shape of x, float32 (float64 for float64 x), every entry <= 0.

    Raises:
        ShapeError, DtypeError, DeviceError: An argument disagrees; names it, what it is and what it should be.
        ConfigError: lower_bound is not negative, or the softplus form has no A_log.
        BackendError: The named backend cannot run this call; lists every backend with its reasons.

    Numerics: float32 throughout (float64 for float64 x); softplus neither overflows nor loses small values. The
        gradients of A_log and dt_bias are summed in a fixed order: two runs agree bit for bit.
    Cost: one pass over memory forward, one backward (backend cpu); the backward keeps the inputs alone.

    Example:
        >>> import torch
        >>> forget_gate(torch.zeros(1, 2, 3), torch.zeros(2), torch.zeros(6), lower_bound=-5.0)[0, 0]
        tensor([-2.5000, -2.5000, -2.5000])
    """
    op = "forget_gate"
    expect_floating(op, x=x, A_log=A_log, dt_bias=dt_bias)
    expect_same_device(op, x=x, A_log=A_log, dt_bias=dt_bias)
    if lower_bound is None and A_log is None:
        raise ConfigError(f"{op}: A_log is None in the softplus form; give A_log [HV], or a lower_bound.")
    if lower_bound is not None and not lower_bound < 0:
        raise ConfigError(f"{op}: lower_bound is {lower_bound}, expected a number below 0, such as -5.0.")
    HV, K = _heads(op, x, A_log, dt_bias)
    if A_log is not None:
        expect_shape(op, "A_log", A_log, (HV,), "HV")
    rows = x.reshape(-1, HV, K)
    call = describe_call(x, A_log, dt_bias, sizes={"M": rows.shape[0], "HV": HV, "K": K})
    bound = None if lower_bound is None else float(lower_bound)
    log_decay: Tensor = FORGET_GATE.choose(call, backend).run(rows, A_log, dt_bias, bound)
    return log_decay.view(x.shape)


def _heads(op: str, x: Tensor, A_log: Tensor | None, dt_bias: Tensor | None) -> tuple[int, int]:
    # HV and K; K is 1 for one decay a head.
    shape = list(x.shape)
    if dt_bias is None:
        if len(shape) >= 2:
            return shape[-2], shape[-1]
        raise ShapeError(
            f"{op}: x is {shape}, expected [..., HV, K]; without dt_bias one decay a head is [..., HV, 1]."
        )
    expect_shape(op, "dt_bias", dt_bias, (None,), "HV * K, or HV")
    biases = dt_bias.shape[0]
    # With T = 1, [..., T, HV] could be one head of HV channels too: the number of rates decides.
    if shape and biases == shape[-1] and (A_log is None or A_log.shape == dt_bias.shape):
        return shape[-1], 1
    if len(shape) >= 2 and biases == shape[-2] * shape[-1]:
        return shape[-2], shape[-1]
    raise ShapeError(
        f"{op}: dt_bias is [{biases}] and x is {shape}, expected [HV * K] with [..., HV, K], or [HV] with [..., HV]."
    )
