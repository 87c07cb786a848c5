"""The forget gate on the CPU: csrc/gate.cpp, one pass over memory forward and one backward."""

import torch
from torch import Tensor

from kimi_linear.ops import native
from kimi_linear.ops.gate import autograd
from kimi_linear.ops.native.library import DTYPES


def _float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


@torch.library.custom_op("kimi_linear::forget_gate_cpu", mutates_args=())
def forget_gate_cpu(x: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None) -> Tensor:
    """Return log_decay [M, HV, K] in float32."""
    log_decay = x.new_empty(x.shape, dtype=torch.float32)
    native.kernel("forget_gate", "ipppfpiii")(
        *(DTYPES[x.dtype], x.contiguous(), _float32(A_log), _float32(dt_bias), lower_bound or 0.0),
        *(log_decay, *x.shape),
    )
    return log_decay


@torch.library.custom_op("kimi_linear::forget_gate_cpu_backward", mutates_args=())
def forget_gate_cpu_backward(
    grad: Tensor, x: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, A_log and dt_bias (empty where there is none)."""
    _, HV, K = x.shape
    grad_x = x.new_empty(x.shape)
    grad_log, grad_bias = (x.new_empty(size, dtype=torch.float32) for size in (HV, HV * K))
    native.kernel("forget_gate_backward", "ippppfpppiii")(
        *(DTYPES[x.dtype], _float32(grad), x.contiguous(), _float32(A_log), _float32(dt_bias), lower_bound or 0.0),
        *(grad_x, grad_log, grad_bias, *x.shape),
    )
    return (
        grad_x,
        x.new_empty(0) if A_log is None else grad_log.to(A_log.dtype),
        x.new_empty(0) if dt_bias is None else grad_bias.to(dt_bias.dtype),
    )


autograd.register(forget_gate_cpu, forget_gate_cpu_backward)
