"""Cut calls: a call of an operator, and where the tokens of each rank start. Run by every rank, and by one process."""

import itertools
import random
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kimi_linear.base.errors import ShapeError
from kimi_linear.base.numerics import relative_error, tolerance
from kimi_linear.ops import (
    ContextParallel,
    delta_rule_cp,
    gated_delta_rule_cp,
    kda_core_cp,
    kda_cp,
    short_conv,
    short_conv_cp,
)
from kimi_linear.ops.conv.specs import SPECS, ConvSpec
from kimi_linear.ops.delta_rule.specs import CORE_CASES, DELTA_RULE_CASES, KDA_CASES, CoreCase, DeltaRuleCase, KdaCase
from support import delta_rule as support
from support import ops

Results = dict[str, Tensor]

# One chunk of the rule's chunked form is 64 tokens: these end on both sides of it and are cut inside, at and beside it.
LONG = (130, 0, 3, 64, 1)


@dataclass(frozen=True)
class Cut:
    """A call of `op` on the inputs of `case`, its tokens cut at `borders`."""

    name: str
    op: str
    case: Any
    borders: tuple[int, ...]
    dtype: torch.dtype = torch.float64
    backend: str | None = "chunk"

    @property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The arguments with a token axis, and the parameters."""
        if self.op == "short_conv":
            return ("x",), ("weight",)
        return support.TOKENS[self.op], support.PARAMETERS[self.op]

    def plan(self, rank: int) -> ContextParallel:
        """Return a rank's plan, made without asking the others."""
        documents = self.case.lengths or (_tokens(self.case),)
        offsets = (0, *itertools.accumulate(documents))
        return ContextParallel(rank, self.borders, offsets, self.case.lengths is not None)

    def inputs(self) -> dict[str, Any]:
        """Return the keyword arguments of the whole call."""
        return self.case.inputs(self.dtype) if self.op == "short_conv" else support.draw(self.case, self.dtype)

    def share(self, rank: int) -> dict[str, Any]:
        """Return the keyword arguments of one rank's call."""
        inputs, plan = self.inputs(), self.plan(rank)
        del inputs["cu_seqlens"]
        tokens = slice(*self.borders[rank : rank + 2])
        batch = inputs[self.names[0][0]].shape[0]
        inputs.update({name: inputs[name][:, tokens] for name in self.names[0] if inputs[name] is not None})
        if inputs["initial_state"] is not None:
            inputs["initial_state"] = inputs["initial_state"][plan.starts.start * batch : plan.starts.stop * batch]
        return inputs

    def call(self, inputs: dict[str, Any], plan: ContextParallel | None = None) -> tuple[Tensor, Tensor]:
        """Run the operator, or with a plan its form for one rank."""
        if plan is None:
            function = short_conv if self.op == "short_conv" else support.FUNCTIONS[self.op]
            return function(**inputs, backend=self.backend)
        functions = {"delta_rule": delta_rule_cp, "kda": kda_cp, "kda_core": kda_core_cp, "short_conv": short_conv_cp}
        scalar = self.op == "kda" and inputs["log_decay"].dim() == 3
        return (gated_delta_rule_cp if scalar else functions[self.op])(plan, **inputs, backend=self.backend)


def _tokens(case: Any) -> int:
    return case.T if case.lengths is None else sum(case.lengths)


def _cut_at_random(op: str, cases: Collection[Any], size: int, **options: Any) -> list[Cut]:
    """Cut every second case for each of the two sizes."""
    found = []
    for case in list(cases)[size // 2 - 1 :: 2]:
        draw, T = random.Random(f"{op} {case.name} {size}"), _tokens(case)
        inner = sorted(draw.randint(0, T) for _ in range(size - 1))
        found.append(Cut(f"{op} {case.name} {inner} {options}", op, case, (0, *inner, T), **options))
    return found


def _cut_everywhere(op: str, case: Any, borders: Collection[tuple[int, ...]]) -> list[Cut]:
    """Cut one call at each of the given borders; a negative one counts from the end."""
    T = _tokens(case)
    return [Cut(f"{op} {case.name} {b}", op, case, (0, *(x if x >= 0 else T + x for x in b), T)) for b in borders]


BORDERS = {
    # Halves; inside the first document and at a document's start; a token on each side; nothing on a rank.
    2: [(65,), (129,), (130,), (133,), (1,), (-1,), (0,), (198,)],
    # One document over all ranks; ranks of one token, of none, first, between and last; two documents cut.
    4: [(20, 64, 129), (1, 2, 3), (40, 41, -1), (30, 30, 100), (0, 60, 60), (50, 131, 198), (100, 150, 198), (0, 0, 0)],
}


def delta_cuts(size: int) -> list[Cut]:
    """Return the cut calls of the delta rule's fronts: by hand, then the operators' own cases at random borders."""
    packed = DeltaRuleCase(name="packed", lengths=LONG, H=1, HV=2, K=5, V=3)
    core = CoreCase(name="packed", lengths=LONG, H=1, HV=2, K=5, V=3)
    dense = KdaCase(name="dense", T=198, B=2, HV=4, K=3, V=5)
    by_hand = [
        *_cut_everywhere("delta_rule", packed, BORDERS[size]),
        *_cut_everywhere("delta_rule", replace(packed, read="pre", erase="key", initial_state=False), BORDERS[size]),
        *_cut_everywhere("kda_core", core, BORDERS[size]),
        *_cut_everywhere("kda", dense, BORDERS[size]),
    ]
    narrow = [CORE_CASES[name] for name in ("T97", "T160", "grouped_4", "extreme", "packed_ragged", "packed_one_long")]
    return [
        *by_hand,
        *_cut_at_random("delta_rule", DELTA_RULE_CASES.values(), size),
        *_cut_at_random("kda", KDA_CASES.values(), size),
        *_cut_at_random("kda_core", CORE_CASES.values(), size),
        *_cut_at_random("kda_core", narrow, size, dtype=torch.float32, backend=None),
        *_cut_at_random("kda_core", narrow, size, dtype=torch.bfloat16, backend=None),
    ]


def conv_cuts(size: int) -> list[Cut]:
    """Return the cut calls of the short convolution: by hand, then the operator's own cases at random borders."""
    packed = ConvSpec("packed", lengths=LONG, D=3, W=5)
    return [
        *_cut_everywhere("short_conv", packed, BORDERS[size]),
        *_cut_everywhere("short_conv", replace(packed, initial_state=False), BORDERS[size]),
        *_cut_everywhere("short_conv", ConvSpec("dense", T=198, B=2, D=3, W=5), BORDERS[size]),
        *_cut_at_random("short_conv", SPECS, size),
        *_cut_at_random("short_conv", SPECS, size, dtype=torch.float32, backend=None),
        *_cut_at_random("short_conv", SPECS, size, dtype=torch.bfloat16, backend=None),
    ]


def one_process(cut: Cut, dtype: torch.dtype | None = None) -> Results:
    """Return outputs and gradients of the whole call; in float64 if that is asked for."""
    inputs, backend = cut.inputs(), cut.backend
    if dtype == torch.float64:
        inputs, backend = ops.in_float64(inputs), "reference"
    (o, state), gradients = ops.run_with_gradients(lambda **a: replace(cut, backend=backend).call(a), inputs)
    return {"o": o, "final_state": state, **{f"d_{name}": g for name, g in gradients.items()}}


def one_rank(cut: Cut, rank: int) -> Results:
    """Return a rank's share of outputs and gradients."""
    plan, (o, state) = cut.plan(rank), _cotangents(cut)
    B = o.shape[0]
    share = [o[:, plan.borders[rank] : plan.borders[rank + 1]], state[plan.ends.start * B : plan.ends.stop * B]]
    (o, state), gradients = ops.run_with_gradients(lambda **a: cut.call(a, plan), cut.share(rank), share)
    return {"o": o, "final_state": state, **{f"d_{name}": g for name, g in gradients.items()}}


def _cotangents(cut: Cut) -> list[Tensor]:
    """Return the gradients of the whole call's outputs."""
    with torch.no_grad():
        return ops.cotangents(list(cut.call(cut.inputs())))


def joined(cut: Cut, shares: list[Results]) -> Results:
    """Put the ranks' results together: tokens and states one after the other, parameters' gradients added up."""
    parameters = {f"d_{name}" for name in cut.names[1]}
    whole = {}
    for name in shares[0]:
        parts = [share[name] for share in shares]
        along = 0 if name in ("final_state", "d_initial_state") else 1
        whole[name] = torch.stack(parts).sum(0) if name in parameters else torch.cat(parts, along)
    return whole


def differences(cut: Cut, found: Results, expected: Results) -> dict[str, float]:
    """Return the relative errors that exceed the tolerance table's row for the call's dtype."""
    allowed, too_large = tolerance(cut.dtype), {}
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        bound = allowed.gradient if name.startswith("d_") else allowed.output
        if name.removeprefix("d_") in support.GATE_GRADIENTS:
            bound = allowed.gate_gradient
        error = relative_error(found[name], reference)
        if not error <= bound:
            too_large[f"{cut.name}: {name}"] = error
    return too_large


def delta_work(rank: int, size: int) -> list[Results]:
    return [one_rank(cut, rank) for cut in delta_cuts(size)]


def conv_work(rank: int, size: int) -> list[Results]:
    return [one_rank(cut, rank) for cut in conv_cuts(size)]


def plain_call_work(rank: int, size: int) -> list[bool]:
    """Return, for each cut, whether a call that needs no gradients gives the results of one that does."""
    found = []
    for cut in delta_cuts(size)[:8]:
        inputs = cut.share(rank)
        o, state = cut.call(inputs, cut.plan(rank))
        assert not o.requires_grad
        other = cut.call({name: ops.requiring_grad(x)[0] for name, x in inputs.items()}, cut.plan(rank))
        found += [torch.equal(o, other[0]), torch.equal(state, other[1])]
    return found


def second_backward_work(rank: int) -> bool:
    """Return whether a second backward through one call gives the gradients of the first."""
    cut = Cut("", "kda", KdaCase(name="T9", T=9), (0, 2, 5, 7, 9))
    inputs = {name: ops.requiring_grad(x)[0] for name, x in cut.share(rank).items()}
    loss, v = cut.call(inputs, cut.plan(rank))[0].sum(), inputs["v"]
    first, second = (torch.autograd.grad(loss, v, retain_graph=True)[0] for _ in range(2))
    return torch.equal(first, second)


def build_work(rank: int) -> list[Any]:
    """Return plans as the ranks make them together, then what they say of arguments that do not fit."""
    lengths = (5, 0, 3)[rank : rank + 1] or (2,)
    offsets = torch.tensor([0, 2, 2, 9, 10])
    plans = [ContextParallel.build(lengths[0], cu_seqlens=offsets), ContextParallel.build(lengths[0])]
    messages = []
    for tokens, other in ((lengths[0], offsets + (rank == 2)), (lengths[0] + (rank == 1), offsets)):
        with pytest.raises(ShapeError) as caught:
            ContextParallel.build(tokens, cu_seqlens=other)
        messages.append(str(caught.value))
    return [*plans, *messages]


class Layer(torch.nn.Module):
    """Three projections, each with its convolution, and the core between them: five meetings of the ranks a call."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64) / 2)

        self.project = torch.nn.ParameterList(draw(6, 2 * K) for K in (4, 4, 3, 4))
        self.taps = torch.nn.ParameterList(draw(2 * K, 4) for K in (4, 4, 3))
        self.strength, self.A_log, self.dt_bias = draw(6, 2), draw(2), draw(8)

    def forward(self, x: Tensor, plan: ContextParallel) -> Tensor:
        mixed = [
            short_conv_cp(plan, x @ weight, taps)[0].unflatten(-1, (2, -1))
            for weight, taps in zip(self.project[:3], self.taps, strict=True)
        ]
        gate = (x @ self.project[3]).unflatten(-1, (2, -1))
        return kda_core_cp(plan, *mixed, gate, x @ self.strength, self.A_log, self.dt_bias)[0].flatten(-2)


def layer_gradients(plan: ContextParallel, recompute: bool) -> list[Tensor]:
    """Return the gradients of two layers' parameters from a plan's tokens."""
    layers = [Layer(), Layer()]
    x = torch.randn(1, plan.borders[-1], 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x[:, plan.borders[plan.rank] : plan.borders[plan.rank + 1]]
    for layer in layers:
        x = checkpoint(layer, x, plan, use_reentrant=False) if recompute else layer(x, plan)
    x.sum().backward()
    return [parameter.grad for layer in layers for parameter in layer.parameters()]


LAYER_BORDERS, LAYER_OFFSETS = (0, 20, 22, 22, 40), (0, 7, 30, 30, 40)


def layer_work(rank: int, recompute: bool) -> list[Tensor]:
    return layer_gradients(ContextParallel(rank, LAYER_BORDERS, LAYER_OFFSETS, is_packed=True), recompute)
