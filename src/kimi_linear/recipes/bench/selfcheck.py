"""No figure of a wrong operator: every backend against the float64 reference, before anything is timed."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kimi_linear.base.errors import BackendError
from kimi_linear.base.numerics import TOLERANCES, relative_error
from kimi_linear.ops import OPS, kda
from kimi_linear.ops.delta_rule import delta_rule_decode
from kimi_linear.ops.registry import Call
from kimi_linear.recipes.bench.cases import Case, cast_inputs

OUTPUTS = ("o", "final state", "d_q", "d_k", "d_v", "d_log_decay", "d_beta")
# A ragged last chunk, several heads, and dims that no vector width divides.
CASES = [
    Case(T, dtype, True, B=2, H=2, K=K, V=K) for dtype in ("float32", "bfloat16") for T, K in ((200, 64), (37, 20))
]
DECODE = (6, 2, 64)


def able_backends(op: str = "delta_rule") -> list[str]:
    """Return the backends of an operator that run calls on the CPU unasked, but the reference."""
    call = Call("cpu", "float32", needs_grad=False)
    return [b.name for b in OPS[op].backends if b.name != "reference" and not b.by_name_only(call)]


def call(inputs: list[Tensor], backend: str) -> list[Tensor]:
    """Return the output, the final state and the gradients of a call."""
    o, state = kda(*inputs, backend=backend)
    weights = torch.linspace(-1.0, 1.0, o.numel(), dtype=o.dtype).view_as(o)
    return [o.detach(), state.detach(), *torch.autograd.grad(o, inputs, weights)]


def differences(backend: str, case: Case) -> Iterator[str]:
    """Yield one sentence for each output of a backend that is off on a case; nothing where it refuses the case."""
    inputs = cast_inputs(case)
    try:
        found = call(inputs, backend)
    except BackendError:
        return
    expected = call([x.detach().double().requires_grad_() for x in inputs], "reference")
    allowed = TOLERANCES[case.dtype]
    limits = [allowed.output] * 2 + [allowed.gradient] * 3 + [allowed.gate_gradient] * 2
    for name, x, y, limit in zip(OUTPUTS, found, expected, limits, strict=True):
        if (error := relative_error(x, y)) > limit:
            yield f"{backend}: {name} of {case.label} is off by {error:.1e}, allowed {limit:.1e}"


def decode_differences(backend: str) -> Iterator[str]:
    """Yield one sentence where a backend's single steps are off."""
    N, H, K = DECODE
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.nn.functional.normalize(torch.randn(N, H, K, generator=generator), dim=-1) for _ in range(3))
    pool, slots = torch.randn(N + 2, H, K, K, generator=generator), torch.tensor([5, 0, 1, -1, 3, 7])
    decay = -torch.rand(N, H, K, generator=generator)
    results = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        states = pool.to(dtype, copy=True)
        a, b, z, g = (x.to(dtype) for x in (q, k, v, decay))
        try:
            o = delta_rule_decode(a, b, b, z, g, states, slots, backend=name)
        except BackendError:
            return
        results.append((o, states))
    for name, x, y in zip(("o", "pool"), *results, strict=True):
        if (error := relative_error(x, y)) > TOLERANCES["float32"].output:
            yield f"{backend}: {name} of a decode step is off by {error:.1e}"


def problems() -> list[str]:
    """Return what is wrong with the operators here, one sentence each; empty when every backend agrees."""
    found = [text for backend in able_backends() for case in CASES for text in differences(backend, case)]
    return found + [text for name in able_backends("delta_rule_decode") for text in decode_differences(name)]
