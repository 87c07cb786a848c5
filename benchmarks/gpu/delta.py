"""Contenders of the delta rule: ours, the plain backend and fla; and whether they agree on what is timed."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gpu import fla_peer, timing
from gpu.setting import Setting
from gpu.shapes import Decode, Kda
from kimi_linear.base import env
from kimi_linear.base.numerics import relative_error, tolerance
from kimi_linear.ops import kda_core, kda_core_decode

OURS, PLAIN, FLA = "kimi-linear", "plain", "fla"
# Ours with more kept from forward to backward, where that can be asked for.
KEPT, KEEP = "kimi-linear keep", "KIMI_LINEAR_TRITON_KEEP"
TOKENS = ("q", "k", "v", "gate", "beta")
GATES = ("gate", "beta")
# A peer and the plain backend may each be off by the table's row.
PEER_ALLOWANCE = 2.0
# The plain backend, in plain PyTorch, is timed where it is quick enough.
PLAIN_TOKEN_HEADS = 2**18
# fla tunes itself anew for every number of heads, half a minute each: it is measured where there is an aim.
PEER_HEADS = (96, 64, 16)
PEER_LEFT_OUT = f"left out: fla tunes itself anew for every number of heads; measured at {PEER_HEADS}"


@dataclass
class Contenders:
    """The calls to time by name; why others are missing; and a check of a call's results by name."""

    calls: dict[str, timing.Call] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    # Each returns the error and the limit of every result, by name.
    checks: dict[str, Callable[[], dict[str, tuple[float, float]]]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    # Sets of inputs the calls rotate through.
    sets: int = 1


def offsets(case: Kda, device: str) -> Tensor | None:
    """Return the offsets of packed sequences."""
    if case.lengths is None:
        return None
    return torch.tensor([0, *itertools.accumulate(case.lengths)], dtype=torch.int32, device=device)


def kda_inputs(case: Kda, setting: Setting) -> dict[str, Any]:
    """Draw the arguments of `kda_core`."""
    B, T, H, D = case.B, case.T, case.H, case.D
    tokens = {name: setting.normal(B, T, H, D, dtype=case.dtype) for name in ("q", "k", "v", "gate")}
    return {
        **tokens,
        "beta": setting.normal(B, T, H, dtype=case.dtype),
        "A_log": setting.normal(H, scale=0.5),
        "dt_bias": setting.normal(H * D),
        "lower_bound": -5.0 if case.bounded else None,
        "cu_seqlens": offsets(case, setting.device),
    }


Run = Callable[[dict[str, Any]], Tensor]


def forward_or_both(run: Run, inputs: dict[str, Any], backward: bool) -> dict[str, Tensor]:
    """Run once; return o and, with `backward`, the gradients of the tokens, whose gradient of o is v."""
    if not backward:
        with torch.no_grad():
            return {"o": run(inputs)}
    wanted = {n: x for n, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad}
    o = run(inputs)
    # Whether a peer gives the parameters gradients is not asked.
    gradients = torch.autograd.grad(o, list(wanted.values()), inputs["v"].detach(), allow_unused=True)
    return {"o": o.detach(), **{f"d_{n}": x for n, x in zip(wanted, gradients, strict=True) if n in TOKENS}}


def with_gradients(inputs: dict[str, Any], wanted: bool) -> dict[str, Any]:
    """Return the inputs as leaves."""
    floating = {n: x for n, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()}
    return {**inputs, **{n: x.detach().requires_grad_(wanted) for n, x in floating.items()}}


def few_heads(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the first and the last head in float64: heads know nothing of each other."""
    H = inputs["q"].shape[2]
    heads = sorted({0, H - 1})
    tokens = {n: inputs[n].detach()[:, :, heads].double() for n in TOKENS}
    bias = inputs["dt_bias"].detach().view(H, -1)[heads].flatten()
    return {**inputs, **tokens, "A_log": inputs["A_log"].detach()[heads].double(), "dt_bias": bias.double()}


def disagreement(
    found: dict[str, Tensor], expected: dict[str, Tensor], dtype: str, allowance: float
) -> dict[str, tuple[float, float]]:
    """Return the error and the limit of every result, of the heads that were computed twice."""
    allowed, errors = tolerance(dtype), {}
    for name, x in found.items():
        heads = sorted({0, x.shape[2] - 1})
        limit = allowed.output if name == "o" else allowed.gate_gradient if name[2:] in GATES else allowed.gradient
        errors[name] = (relative_error(x[:, :, heads], expected[name]), allowance * limit)
    return errors


def has_peer(case: Kda) -> bool:
    """Whether the incumbent is measured too: where its tuning is shared by several cases, or there is an aim."""
    main = (case.B, case.T, case.D) == (1, 8192, 128)
    return case.H in PEER_HEADS and case.D == 128 and case.dtype == "bfloat16" and (main or not case.backward)


def kda_contenders(case: Kda, setting: Setting, skip: tuple[str, ...] = ()) -> Contenders:
    """Build the contenders of a call over many tokens."""
    torch.manual_seed(0)
    found = Contenders(sets=setting.sets)
    inputs = [with_gradients(kda_inputs(case, setting), case.backward) for _ in range(setting.sets)]

    def keeping(x: dict[str, Any]) -> Tensor:
        with env.changed(KEEP, "states"):
            return kda_core(**x, backend=setting.ours)[0]

    runs: dict[str, Run] = {OURS: lambda x: kda_core(**x, backend=setting.ours)[0]}
    if case.backward and KEEP in env.VARIABLES:
        runs[KEPT] = keeping
    if case.token_heads <= PLAIN_TOKEN_HEADS and not case.graph:
        runs[PLAIN] = lambda x: kda_core(**x, backend=setting.plain)[0]
    try:
        if has_peer(case) or not setting.on_gpu:
            runs[FLA] = fla_peer.chunk(case.bounded)
            found.versions[FLA] = fla_peer.version()
        else:
            found.reasons[FLA] = PEER_LEFT_OUT
    except fla_peer.PeerError as missing:
        found.reasons[FLA] = str(missing)
    kept: list[dict[str, Tensor]] = []

    def expected() -> dict[str, Tensor]:
        if not kept:
            # Two heads are little work for any backend.
            few = with_gradients(few_heads(inputs[0]), case.backward)
            kept.append(forward_or_both(lambda x: kda_core(**x, backend="chunk")[0], few, case.backward))
        return kept[0]

    for name, run in runs.items():
        if name in skip:
            continue
        found.calls[name] = lambda index, run=run: forward_or_both(run, inputs[index % setting.sets], case.backward)
        if name != PLAIN:
            allowance = PEER_ALLOWANCE if name == FLA else 1.0
            found.checks[name] = lambda run=run, allowance=allowance: disagreement(
                forward_or_both(run, inputs[0], case.backward), expected(), case.dtype, allowance
            )
    return found


def decode_inputs(case: Decode, setting: Setting) -> dict[str, Any]:
    """Draw the arguments of `kda_core_decode`, the slots in any order."""
    N, H, D = case.N, case.H, case.D
    tokens = {name: setting.normal(N, H, D, dtype=case.dtype) for name in ("q", "k", "v", "gate")}
    slots = torch.randperm(N, device="cpu").to(setting.device)
    return {
        **tokens,
        "beta": setting.normal(N, H, dtype=case.dtype),
        "A_log": setting.normal(H, scale=0.5),
        "dt_bias": setting.normal(H * D),
        "pool": setting.normal(N, H, D, D, dtype=case.pool),
        "slots": slots,
    }


def decode_contenders(case: Decode, setting: Setting, skip: tuple[str, ...] = ()) -> Contenders:
    """Build the contenders of one token a sequence."""
    torch.manual_seed(0)
    # The pools of two sets pass every cache already.
    sets = min(setting.sets, 2)
    found = Contenders(sets=sets)
    inputs = [decode_inputs(case, setting) for _ in range(sets)]

    def step(backend: str, x: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            return kda_core_decode(**x, backend=backend)

    found.calls[OURS] = lambda index: step(setting.ours, inputs[index % sets])
    if case.pool == "float32" and not case.graph:
        found.calls[PLAIN] = lambda index: step(setting.plain, inputs[index % sets])

    def check() -> dict[str, tuple[float, float]]:
        x = {n: y.clone() if isinstance(y, Tensor) else y for n, y in inputs[0].items()}
        wide = {n: y.double() if isinstance(y, Tensor) and y.is_floating_point() else y for n, y in x.items()}
        o, expected = step(setting.ours, x), step("chunk", wide)
        limit, of_pool = tolerance(case.dtype).output, tolerance(case.pool).output
        return {"o": (relative_error(o, expected), limit), "pool": (relative_error(x["pool"], wide["pool"]), of_pool)}

    found.checks[OURS] = check
    try:
        recurrent = fla_peer.recurrent()
        found.versions[FLA] = fla_peer.version()
        if case.pool == "float32":
            # It returns new states: what an engine copies back is not counted against it.
            found.calls[FLA] = lambda index: recurrent(inputs[index % sets])
            found.checks[FLA] = lambda: fla_check(recurrent, inputs[0], case, step)
    except fla_peer.PeerError as missing:
        found.reasons[FLA] = str(missing)
    for name in skip:
        found.calls.pop(name, None)
    return found


def fla_check(
    recurrent: Run, given: dict[str, Any], case: Decode, step: Callable[[str, dict[str, Any]], Tensor]
) -> dict[str, tuple[float, float]]:
    """Compare a token of fla's with the plain backend's."""
    x = {**given, "pool": given["pool"][given["slots"]], "slots": torch.arange(case.N, device=given["slots"].device)}
    o = recurrent(x)
    limit = PEER_ALLOWANCE * tolerance(case.dtype).output
    return {"o": (relative_error(o.view(x["v"].shape), step("chunk", x)), limit)}
