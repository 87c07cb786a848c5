"""One case from its inputs to its rows: build the contenders, hold them against each other, time what agrees."""

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from gpu import timing
from gpu.delta import OURS, Contenders, decode_contenders, kda_contenders
from gpu.layers import layer_contenders
from gpu.others import operator_contenders
from gpu.setting import Setting
from gpu.shapes import Case
from gpu.timing import Timing
from kimi_linear.recipes.bench.record import Row

BUILDERS: dict[str, Callable[..., Contenders]] = {
    "kda": kda_contenders,
    "decode": decode_contenders,
    "layer": layer_contenders,
    "operators": operator_contenders,
}


def build(case: Case, setting: Setting, skip: tuple[str, ...] = ()) -> Contenders:
    """Return the contenders of a case as it is run here."""
    return BUILDERS[case.section](setting.case(case), setting, skip)


def verdict(errors: dict[str, tuple[float, float]]) -> str:
    """Return what is wrong with a result, or ""."""
    # NaN is not below a limit either.
    wrong = [
        f"{name} by {error:.1e}, allowed {limit:.1e}" for name, (error, limit) in errors.items() if not error <= limit
    ]
    return f"wrong result, not timed: off in {'; '.join(wrong)}" if wrong else ""


def check(contenders: Contenders, setting: Setting) -> tuple[dict[str, dict[str, float]], str]:
    """Drop the contenders whose results differ; return the errors of all, and who lost the device, if someone did."""
    found: dict[str, dict[str, float]] = {}
    for name, run in contenders.checks.items():
        if name not in contenders.calls:
            continue
        state = Timing()
        errors: dict[str, tuple[float, float]] = {}
        timing.attempt(state, lambda run=run, errors=errors: errors.update(run()))
        if reason := state.reason or verdict(errors):
            contenders.reasons[name] = reason
            del contenders.calls[name]
        found[name] = {result: error for result, (error, _) in errors.items()}
        if state.reason and setting.lost():
            return found, name
    return found, ""


def in_graphs(contenders: Contenders, setting: Setting) -> str:
    """Replace every call by the replay of its graph; return who lost the device, if someone did."""
    for name, call in list(contenders.calls.items()):
        state = Timing()

        def capture(name: str = name, call: timing.Call = call) -> None:
            contenders.calls[name] = timing.captured(call, contenders.sets)

        timing.attempt(state, capture)
        if state.reason:
            contenders.reasons[name] = f"no graph: {state.reason}"
            del contenders.calls[name]
            if setting.lost():
                return name
    return ""


def rows_of(
    case: Case, contenders: Contenders, timings: dict[str, Timing], errors: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return a row for everyone who took part or could not."""
    work, rows = case.work(), []
    for name in dict.fromkeys([*timings, *contenders.reasons]):
        found = timings.get(name) or Timing(reason=contenders.reasons[name])
        extra = {"bytes": work.bytes, "flop": work.flop, "token_heads": case.token_heads, "errors": errors.get(name)}
        extra |= {"host_us": found.host_us, "peak_bytes": found.peak_bytes}
        kept = {key: value for key, value in extra.items() if value is not None}
        version = contenders.versions.get(name, "")
        row = Row(case.section, name, case.as_dict(), "ms", found.ms, version=version, reason=found.reason, extra=kept)
        rows.append(row.as_dict())
    return rows


def measure(case: Case, setting: Setting, clock: timing.HostClock, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the rows of a case, and who lost the device, if someone did: then the process is of no more use."""
    state, culprit = Timing(), ""
    errors: dict[str, dict[str, float]] = {}
    contenders = Contenders()
    timings: dict[str, Timing] = {}

    def everything() -> None:
        nonlocal contenders, errors, timings, culprit
        contenders = build(case, setting, skip)
        errors, culprit = check(contenders, setting)
        if not culprit and getattr(case, "graph", False) and setting.on_gpu:
            culprit = in_graphs(contenders, setting)
        if culprit:
            contenders.reasons |= dict.fromkeys(contenders.calls, f"{timing.LOST} by {culprit}")
            return
        timings = timing.compare(contenders.calls, clock, setting.effort, setting.lost)

    timing.attempt(state, everything)
    if state.reason:
        contenders.reasons.setdefault(OURS, state.reason)
    shown = case if setting.on_gpu else setting.case(case)
    rows = rows_of(shown, contenders, timings, errors)
    lost = culprit or next((r["engine"] for r in rows if r.get("reason") and timing.LOST not in r["reason"]), OURS)
    # Freed before the next case is drawn.
    del contenders, timings
    gc.collect()
    is_lost = setting.lost()
    if setting.on_gpu and not is_lost:
        torch.cuda.empty_cache()
    return {"rows": rows, "lost": lost if is_lost else ""}


def warm(case: Case, setting: Setting, skip: tuple[str, ...]) -> str:
    """Call the contenders once, so that their kernels are compiled; return what went wrong, or ""."""
    # One set: only the kernels matter.
    contenders = build(case, replace(setting, sets=1), skip)
    problems = []
    for name, call in contenders.calls.items():
        state = Timing()
        timing.attempt(state, lambda call=call: call(0))
        if state.reason:
            problems.append(f"{name}: {state.reason}")
    if setting.on_gpu:
        torch.cuda.synchronize()
        del contenders
        torch.cuda.empty_cache()
    return "; ".join(problems)
