"""The operators of flash-linear-attention, if they can be imported here, given what ours are given."""

import importlib
import inspect
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from typing import Any

from torch import Tensor

# What fuses the same work into the call as ours, where the function knows it.
FUSED = ("use_qk_l2norm_in_kernel", "use_gate_in_kernel")


class PeerError(Exception):
    """It cannot be measured; the text says why."""


def version() -> str:
    """Return the installed version."""
    for name in ("fla-core", "flash-linear-attention"):
        try:
            return installed(name)
        except PackageNotFoundError:
            continue
    return "of unknown version"


def load(name: str) -> tuple[Callable[..., Any], frozenset[str]]:
    """Return a function of `fla.ops.kda` and the names of its arguments."""
    try:
        module = importlib.import_module("fla.ops.kda")
    except Exception as error:
        # Its modules ask much of other packages, and fail in other ways than by their absence.
        raise PeerError(f"not measured: {type(error).__name__}: {error}".splitlines()[0]) from error
    function = getattr(module, name, None)
    if function is None:
        raise PeerError(f"not measured: fla {version()} has no {name}")
    names = frozenset(inspect.signature(inspect.unwrap(function)).parameters)
    if missing := [option for option in FUSED if option not in names]:
        raise PeerError(f"not measured: {name} of fla {version()} has no {', '.join(missing)}")
    return function, names


def arguments(x: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    """Return fla's arguments for ours."""
    given = {"q": x["q"], "k": x["k"], "v": x["v"], "g": x["gate"], "A_log": x["A_log"], "dt_bias": x["dt_bias"]}
    if "use_beta_sigmoid_in_kernel" in names:
        given |= {"beta": x["beta"], "use_beta_sigmoid_in_kernel": True}
    else:
        # Part of the call, as of ours.
        given["beta"] = x["beta"].sigmoid()
    given |= dict.fromkeys(FUSED, True)
    return given | {"output_final_state": True}


def chunk(bounded: bool) -> Callable[[dict[str, Any]], Tensor]:
    """Return fla's call over many tokens, which gives o."""
    function, names = load("chunk_kda")
    if bounded and not {"safe_gate", "lower_bound"} <= names:
        raise PeerError(f"not measured: chunk_kda of fla {version()} has no bounded gate")

    def run(x: dict[str, Any]) -> Tensor:
        given = arguments(x, names)
        if bounded:
            given |= {"safe_gate": True, "lower_bound": x["lower_bound"]}
        if x["cu_seqlens"] is not None:
            given["cu_seqlens"] = x["cu_seqlens"]
        return function(**given)[0]

    return run


def recurrent() -> Callable[[dict[str, Any]], Tensor]:
    """Return fla's call for one token a sequence, which gives o."""
    function, names = load("fused_recurrent_kda")

    def run(x: dict[str, Any]) -> Tensor:
        tokens = {n: x[n].unsqueeze(1) for n in ("q", "k", "v", "gate", "beta")}
        given = arguments({**x, **tokens}, names)
        # Its rows are in order; ours are where the slots say.
        return function(**given, initial_state=x["pool"])[0]

    return run
