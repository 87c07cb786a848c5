"""The routed experts through torch's grouped matrix product, one call for all experts. Equations as in reference.py.

The host reads no count: the product takes the runs' ends where they are. On a GPU torch has such a kernel for bfloat16
alone (CUTLASS, compute capability 9 and 10); for anything else it fetches the ends and loops, so that is refused.

Kept for the backward: h1 and h3, 2 * M * k * F elements of x's dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.ops.autocast import without_autocast
from kimi_linear.ops.checks import compute_dtype
from kimi_linear.ops.moe.checks import check_experts_values
from kimi_linear.ops.moe.experts_autograd import register
from kimi_linear.ops.moe.runs import activation_gradients, combine, inverse, sort_by_expert
from kimi_linear.ops.registry import Call

# Bytes that a row, and the start of a tensor, must be a multiple of.
ALIGNMENT = 16
_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
# What torch's kernel is built for, and how many experts it takes.
_CAPABILITIES, _MOST_EXPERTS = (9, 10), 1023


def refuse(call: Call) -> list[str]:
    """Refuse what torch's product does not take, or takes only by waiting for the GPU."""
    reasons = []
    if not hasattr(F, "grouped_mm"):
        reasons.append("this torch has no grouped_mm, which came with 2.10")
    if call.device == "cuda":
        reasons += _refuse_on_gpu(call)
    elif call.device != "cpu":
        reasons.append(f"tensors are on {call.device}, neither on a GPU nor on the CPU")
    if call.dtype not in _SIZES:
        return [*reasons, f"{call.dtype} is not one of {', '.join(_SIZES)}"]
    unit = ALIGNMENT // _SIZES[call.dtype]
    D, width = call.sizes["D"], call.sizes["F"]
    if D % unit or width % unit:
        reasons.append(f"D = {D} and F = {width} must be multiples of {unit}: rows of {ALIGNMENT} bytes")
    return reasons


def _refuse_on_gpu(call: Call) -> list[str]:
    reasons = []
    if call.dtype != "bfloat16":
        reasons.append(f"torch loops over the experts on a GPU for {call.dtype}: only bfloat16 has a kernel")
    if torch.version.cuda is None or torch.cuda.get_device_capability()[0] not in _CAPABILITIES:
        reasons.append("torch has the kernel for NVIDIA GPUs of compute capability 9 and 10 alone")
    if call.sizes["E"] > _MOST_EXPERTS:
        reasons.append(f"E is above {_MOST_EXPERTS}")
    return reasons


def _aligned(x: Tensor) -> Tensor:
    """Return the tensor contiguous, and starting at a multiple of 16 bytes."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % ALIGNMENT else x


@torch.library.custom_op("kimi_linear::grouped_mlp_grouped_mm", mutates_args=())
def grouped_mlp_grouped_mm(
    x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, weights: Tensor, experts: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (o, h1, h3); h1 and h3 [M * k, F] in sorted order, empty unless `keep`."""
    check_experts_values(experts, w1.shape[0])
    (A, width), low, wide = (experts.numel(), w1.shape[1]), x.dtype, compute_dtype(x)
    if A == 0:
        return x.new_zeros(x.shape), x.new_empty(0, width), x.new_empty(0, width)
    runs = sort_by_expert(experts, w1.shape[0])
    w1, w3, w2 = (_aligned(w) for w in (w1, w3, w2))
    with without_autocast(x.device):
        tokens = x[runs.order // experts.shape[1]]
        h1, h3 = (F.grouped_mm(tokens, w.mT, offs=runs.ends) for w in (w1, w3))
        # Eq. 1
        a = F.silu(h1.to(wide)).mul_(h3).to(low)
        y = F.grouped_mm(a, w2.mT, offs=runs.ends)
    # Eq. 2
    o = combine(y, inverse(runs.order).view(experts.shape), weights).to(low)
    return (o, h1, h3) if keep else (o, x.new_empty(0, width), x.new_empty(0, width))


@torch.library.custom_op("kimi_linear::grouped_mlp_grouped_mm_backward", mutates_args=())
def grouped_mlp_grouped_mm_backward(
    d_o: Tensor,
    x: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    weights: Tensor,
    experts: Tensor,
    h1: Tensor,
    h3: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Equations 3 to 5: gradients of x, w1, w3, w2 and weights."""
    if experts.numel() == 0:
        return tuple(t.new_zeros(t.shape) for t in (x, w1, w3, w2, weights))  # type: ignore[return-value]
    runs, low, wide = sort_by_expert(experts, w1.shape[0]), x.dtype, compute_dtype(x)
    token, row = runs.order // experts.shape[1], inverse(runs.order)
    w1, w3, w2 = (_aligned(w) for w in (w1, w3, w2))
    with without_autocast(x.device):
        tokens, grad = x[token], d_o[token]
        b = F.grouped_mm(grad, w2, offs=runs.ends).to(wide)
        c = weights.flatten()[runs.order].to(wide)[:, None]
        d_c, weighed, d_h1, d_h3 = activation_gradients(h1.to(wide), h3.to(wide), b, c, low)
        # Rows of tokens on both sides: the one layout in which torch's kernel takes an empty run.
        d_w2 = F.grouped_mm(grad.mT, weighed, offs=runs.ends)
        # Eq. 5
        d_w1, d_w3 = (F.grouped_mm(d_h.mT, tokens, offs=runs.ends) for d_h in (d_h1, d_h3))
        d_rows = F.grouped_mm(d_h1, w1, offs=runs.ends) + F.grouped_mm(d_h3, w3, offs=runs.ends)
    d_weights = d_c[row].view(weights.shape).to(weights.dtype)
    return combine(d_rows, row.view(experts.shape), None).to(low), d_w1, d_w3, d_w2, d_weights


run = register(grouped_mlp_grouped_mm, grouped_mlp_grouped_mm_backward)
