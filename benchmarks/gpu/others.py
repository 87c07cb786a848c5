"""Contenders of the other operators: ours, the plain backend, and torch's own functions put together."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.delta import OURS, PLAIN, Contenders
from gpu.setting import Setting
from gpu.shapes import LATENT, ROPE, Operator
from kimi_linear.base.numerics import relative_error, tolerance
from kimi_linear.ops import gated_rms_norm, grouped_mlp, linear_cross_entropy, mla_decode, short_conv

TORCH = "torch"
TAPS, EPS = 4, 1e-5
Arguments = dict[str, Any]
# The plain backend where there is no "chunk".
PLAINS = {
    "gated_rms_norm": "reference",
    "mla_decode": "absorbed",
    "grouped_mlp": "grouped",
    "short_conv": "chunk",
    "linear_cross_entropy": "chunk",
}


def conv_inputs(case: Operator, setting: Setting) -> Arguments:
    """Draw the arguments of `short_conv`: one sequence."""
    normal = setting.normal
    return {"x": normal(1, case.rows, case.width, dtype=case.dtype), "weight": normal(case.width, TAPS, scale=0.5)}


def norm_inputs(case: Operator, setting: Setting) -> Arguments:
    """Draw the arguments of `gated_rms_norm`."""
    x, gate = (setting.normal(case.rows, case.width, dtype=case.dtype) for _ in range(2))
    return {"x": x, "gate": gate, "weight": setting.normal(case.width)}


def entropy_inputs(case: Operator, setting: Setting) -> Arguments:
    """Draw the arguments of `linear_cross_entropy`."""
    weight = setting.normal(case.vocabulary, case.width, dtype=case.dtype, scale=case.width**-0.5)
    labels = torch.randint(case.vocabulary, (case.rows,)).to(setting.device)
    return {"hidden": setting.normal(case.rows, case.width, dtype=case.dtype), "weight": weight, "labels": labels}


def latent_inputs(case: Operator, setting: Setting) -> Arguments:
    """Draw the arguments of `mla_decode`, all caches full."""
    N, S, H, kind = case.rows, case.positions, case.heads, case.dtype
    return {
        "q": setting.normal(N, H, 128 + ROPE, dtype=kind),
        "latent": setting.normal(N, S, LATENT, dtype=kind),
        "key_rope": setting.normal(N, S, ROPE, dtype=kind),
        "lengths": torch.full((N,), S, device=setting.device),
        "kv_b": setting.normal(H * 256, LATENT, dtype=kind, scale=LATENT**-0.5),
    }


def expert_inputs(case: Operator, setting: Setting) -> Arguments:
    """Draw the arguments of `grouped_mlp`, every choice as likely."""
    E, D, inner, kind = case.experts, case.width, case.expert_width, case.dtype
    experts = torch.rand(case.rows, E).topk(case.top_k).indices.to(setting.device)
    return {
        "x": setting.normal(case.rows, D, dtype=kind),
        "w1": setting.normal(E, inner, D, dtype=kind, scale=D**-0.5),
        "w3": setting.normal(E, inner, D, dtype=kind, scale=D**-0.5),
        "w2": setting.normal(E, D, inner, dtype=kind, scale=inner**-0.5),
        "weights": setting.normal(case.rows, case.top_k).softmax(-1),
        "experts": experts,
    }


INPUTS: dict[str, Callable[[Operator, Setting], Arguments]] = {
    "short_conv": conv_inputs,
    "gated_rms_norm": norm_inputs,
    "linear_cross_entropy": entropy_inputs,
    "mla_decode": latent_inputs,
    "grouped_mlp": expert_inputs,
}
OURS_CALLS: dict[str, Callable[..., Tensor]] = {
    "short_conv": lambda **x: short_conv(**x)[0],
    "gated_rms_norm": lambda **x: gated_rms_norm(**x, eps=EPS),
    "linear_cross_entropy": linear_cross_entropy,
    "mla_decode": lambda **x: mla_decode(**x, nope_dim=128),
    "grouped_mlp": grouped_mlp,
}


def torch_conv(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve with torch's depthwise convolution, which wants channels first."""
    taps = weight.to(x.dtype).unsqueeze(1)
    y = F.conv1d(F.pad(x.transpose(1, 2), (TAPS - 1, 0)), taps, groups=x.shape[2])
    return F.silu(y).transpose(1, 2)


def torch_norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """Norm and gate with torch's functions."""
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), EPS) * gate.sigmoid()


def torch_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Take all logits, then torch's cross entropy."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


TORCH_CALLS: dict[str, Callable[..., Tensor]] = {
    "short_conv": torch_conv,
    "gated_rms_norm": torch_norm,
    "linear_cross_entropy": torch_entropy,
}


def run(function: Callable[..., Tensor], inputs: Arguments, backward: bool) -> dict[str, Tensor]:
    """Run once; return the output and, with `backward`, the gradients of all floating inputs."""
    if not backward:
        with torch.no_grad():
            return {"o": function(**inputs)}
    wanted = {n: x for n, x in inputs.items() if x.requires_grad}
    o = function(**inputs)
    gradients = torch.autograd.grad(o, list(wanted.values()), torch.ones_like(o))
    return {"o": o.detach(), **{f"d_{n}": x for n, x in zip(wanted, gradients, strict=True)}}


def operator_contenders(case: Operator, setting: Setting, skip: tuple[str, ...] = ()) -> Contenders:
    """Build the contenders of an operator."""
    torch.manual_seed(0)
    sets = 1 if case.op in ("grouped_mlp", "linear_cross_entropy") else setting.sets
    found = Contenders(sets=sets)
    inputs = []
    for _ in range(sets):
        drawn = INPUTS[case.op](case, setting)
        inputs.append({n: x.requires_grad_(case.backward and x.is_floating_point()) for n, x in drawn.items()})
    ours = OURS_CALLS[case.op]
    backend = setting.ours if setting.device != "cpu" else PLAINS[case.op]
    functions: dict[str, Callable[..., Tensor]] = {
        OURS: lambda **x: ours(**x, backend=backend),
        PLAIN: lambda **x: ours(**x, backend=PLAINS[case.op]),
    }
    if case.op in TORCH_CALLS:
        functions[TORCH] = TORCH_CALLS[case.op]
    kept: list[dict[str, Tensor]] = []

    def expected() -> dict[str, Tensor]:
        if not kept:
            kept.append(run(functions[PLAIN], inputs[0], case.backward))
        return kept[0]

    def check(function: Callable[..., Tensor]) -> dict[str, tuple[float, float]]:
        allowed, errors = tolerance(case.dtype), {}
        for name, x in run(function, inputs[0], case.backward).items():
            limit = allowed.output if name == "o" else allowed.gate_gradient
            # Both round to the dtype, each in its own places.
            errors[name] = (relative_error(x, expected()[name]), 2 * limit)
        return errors

    for name, function in functions.items():
        if name not in skip:
            found.calls[name] = lambda index, f=function: run(f, inputs[index % sets], case.backward)
            if name != PLAIN:
                found.checks[name] = lambda f=function: check(f)
    return found
