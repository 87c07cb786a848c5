"""The reference is the definition: it is held against the equations as they read, and against finite differences."""

import itertools

import pytest
import torch
from torch import Tensor

from kimi_linear.ops.delta_rule.reference import recurrent_backward, recurrent_forward
from kimi_linear.ops.delta_rule.specs import CoreCase, DeltaRuleCase
from support import ops
from support.delta_rule import BACKENDS, Inputs, assert_close, call, draw, errors, results, run, widest

# Finite differences need double precision.
DOUBLE = [(op, backend) for op, backend in BACKENDS if widest(op, backend) == torch.float64]
FLAGS = [
    pytest.param(erase, scalar, read, id=f"{erase}-{'scalar' if scalar else 'channel'}-{read}")
    for erase, scalar, read in itertools.product(["none", "key", "value"], [False, True], ["post", "pre"])
]


def matrices(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Run the recurrence with transition matrices, one sequence and one head after the other."""
    q, k, e, z, g = (inputs[n] for n in ("q", "k", "erase_key", "write_value", "log_decay"))
    (B, T, H, K), HV = q.shape, z.shape[2]
    g = g if g.dim() == 4 else g.unsqueeze(-1).expand(B, T, HV, K)
    e = torch.zeros(B, T, HV, K, dtype=q.dtype) if e is None else e.repeat_interleave(HV // e.shape[2], 2)
    o, final = torch.zeros_like(z), inputs["initial_state"].clone()
    for b, h in itertools.product(range(B), range(HV)):
        S = final[b, h]
        for t in range(T):
            q_t, k_t = (x[b, t, h // (HV // H)] for x in (q, k))
            D = torch.diag(g[b, t, h].exp())
            erase = torch.outer(k_t, e[b, t, h])
            A = D - erase @ D if inputs["read"] == "post" else D - erase
            S = A @ S + torch.outer(k_t, z[b, t, h])
            o[b, t, h] = K**-0.5 * S.T @ q_t
        final[b, h] = S
    return o, final


@pytest.mark.parametrize(("op", "backend"), [pair for pair in BACKENDS if pair[0] == "delta_rule"])
@pytest.mark.parametrize(("erase", "scalar", "read"), FLAGS)
def test_outputs_are_those_of_the_transition_matrices(op, backend, erase, scalar, read) -> None:
    case = DeltaRuleCase(name="x", T=9, B=2, HV=4, K=3, V=2, erase=erase, scalar_decay=scalar, read=read)
    inputs = draw(case, widest(op, backend))
    assert_close(call(op, inputs, backend), matrices(inputs))


@pytest.mark.parametrize(("erase", "scalar", "read"), FLAGS)
@pytest.mark.parametrize("gate", ["medium", "none", "mixed"])
def test_backward_is_autograd_through_the_forward(erase, scalar, read, gate) -> None:
    case = DeltaRuleCase(name="x", T=20, B=2, erase=erase, scalar_decay=scalar, read=read, gate=gate)
    inputs = draw(case, torch.float64)
    names = ("q", "k", "erase_key", "write_value", "log_decay")
    given = [inputs[n] for n in names]

    def forward(**x: Tensor) -> tuple[Tensor, Tensor]:
        return recurrent_forward(*(x[n] for n in names), 0.3, x["initial_state"], read)

    leaves = {n: inputs[n] for n in (*names, "initial_state")}
    expected = results(forward, leaves)
    cotangents = ops.cotangents([expected["o"], expected["final_state"]])
    found = recurrent_backward(*cotangents, *given, 0.3, inputs["initial_state"], read)
    for name, gradient in zip((*names, "initial_state"), found, strict=True):
        if gradient is not None:
            torch.testing.assert_close(gradient, expected[f"d_{name}"], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("op", "backend"), [pair for pair in DOUBLE if pair[0] == "delta_rule"])
@pytest.mark.parametrize(("erase", "scalar", "read"), FLAGS)
@pytest.mark.parametrize("lengths", [None, (3, 0, 1)], ids=["dense", "packed"])
def test_delta_rule_gradients_match_finite_differences(op, backend, erase, scalar, read, lengths) -> None:
    flags = {"erase": erase, "scalar_decay": scalar, "read": read, "lengths": lengths}
    case = DeltaRuleCase(name="x", T=4, H=1, HV=2, K=2, V=1, initial_state=lengths is None or not scalar, **flags)
    assert ops.gradcheck(lambda **x: call(op, x, backend), draw(case, torch.float64))


@pytest.mark.parametrize(("op", "backend"), [pair for pair in DOUBLE if pair[0] == "kda_core"])
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"has_bias": False, "initial_state": False},
        {"allow_neg_eigval": True, "lengths": (3, 0, 1)},
        {"lower_bound": -5.0, "allow_neg_eigval": True},
        {"lower_bound": -2.0, "has_rate": False},
        {"lower_bound": -5.0, "has_rate": False, "has_bias": False},
    ],
    ids=lambda flags: "-".join(flags) or "plain",
)
def test_kda_core_gradients_match_finite_differences(op, backend, flags) -> None:
    case = CoreCase(name="x", **{"T": 4, "H": 1, "HV": 2, "K": 2, "V": 2, **flags})
    assert ops.gradcheck(lambda **x: call(op, x, backend), draw(case, torch.float64))


def written_out(**x: Tensor) -> tuple[Tensor, Tensor]:
    """`kda_core` as its docstring reads, for one value head a key head."""
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (x["q"], x["k"]))
    (HV, K), bound = x["gate"].shape[2:], x["lower_bound"]
    u = x["gate"] + x["dt_bias"].view(HV, K)
    rate = x["A_log"].exp().view(HV, 1)
    g = -rate * (1 + u.exp()).log() if bound is None else bound / (1 + (-rate * u).exp())
    strength = (1 + x["allow_neg_eigval"]) / (1 + (-x["beta"]).exp()).unsqueeze(-1)
    return recurrent_forward(q, k, strength * k, strength * x["v"], g, K**-0.5, x["initial_state"], "post")


@pytest.mark.parametrize(("op", "backend"), [pair for pair in BACKENDS if pair[0] == "kda_core"])
@pytest.mark.parametrize("bound", [None, -5.0])
@pytest.mark.parametrize("negative", [False, True])
def test_kda_core_is_what_it_says(op, backend, bound, negative) -> None:
    case = CoreCase(name="x", T=40, B=2, lower_bound=bound, allow_neg_eigval=negative, zero_rows=True)
    dtype = widest(op, backend)
    inputs = draw(case, dtype)
    assert errors(run(op, inputs, backend), results(written_out, ops.in_float64(inputs)), dtype) == {}
