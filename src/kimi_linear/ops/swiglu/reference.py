"""The gated activation in the obvious form.

y = silu(gate) up,   silu(x) = x sigmoid(x)                                              (1)
dgate = dy up silu'(gate),   dup = dy silu(gate)                                         (2)
silu'(x) = sigmoid(x) (1 + x (1 - sigmoid(x)))
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.ops.checks import compute_dtype
from kimi_linear.ops.swiglu.autograd import register


@torch.library.custom_op("kimi_linear::swiglu_reference", mutates_args=())
def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """Eq. 1."""
    wide = compute_dtype(gate)
    return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype).contiguous()


@torch.library.custom_op("kimi_linear::swiglu_reference_backward", mutates_args=())
def swiglu_reference_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 2: the gradients of gate and up."""
    wide = compute_dtype(gate)
    grad, x = grad.to(wide), gate.to(wide)
    sigmoid = x.sigmoid()
    grad_gate = grad * up.to(wide) * (sigmoid * (1 + x * (1 - sigmoid)))
    grad_up = grad * (x * sigmoid)
    return _like(grad_gate, gate), _like(grad_up, up)


def _like(grad: Tensor, x: Tensor) -> Any:
    return grad.to(x.dtype).contiguous()


register(swiglu_reference, swiglu_reference_backward)
