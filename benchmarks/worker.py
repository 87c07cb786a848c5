"""A process that runs one implementation of Kimi Delta Attention when told to, one JSON line a command.

It imports torch and the implementation it was started for, nothing of ours for a peer; so it runs in either
environment, and this same code times them all.
"""

import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

import serving

INPUTS = ("q", "k", "v", "log_decay", "beta")
Run = Callable[..., tuple[Tensor, Tensor]]


def load_ours(backend: str) -> tuple[Run, str]:
    """Return `kimi_linear.ops.kda` with a backend."""
    import kimi_linear
    from kimi_linear.ops import kda

    return lambda *inputs: kda(*inputs, backend=backend), kimi_linear.__version__


def load_fla() -> tuple[Run, str]:
    """Return the chunked form in plain PyTorch of flash-linear-attention."""
    from fla.ops.kda.naive import naive_chunk_kda

    return lambda *inputs: naive_chunk_kda(*inputs, output_final_state=True), version("fla-core")


def load_attn_gym() -> tuple[Run, str]:
    """Return attention-gym's reference; its state is [B, H, V, K], ours [B, H, K, V]."""
    from attn_gym.linear.kda import chunk_kda

    def run(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        o, state = chunk_kda(*inputs, output_final_state=True, impl="reference")
        return o, state.transpose(-1, -2)

    return run, version("attn-gym")


def load_transformers() -> tuple[Run, str]:
    """Return the chunked form in plain PyTorch that transformers runs where there is no GPU."""
    serving.hide_fla()
    from transformers.models.kimi_linear import modeling_kimi_linear as network

    chunk_kda = network.chunk_kimi_delta_attention
    return lambda *inputs: chunk_kda(*inputs, output_final_state=True), version("transformers")


LOADERS = {"fla": load_fla, "attn-gym": load_attn_gym, "transformers": load_transformers}


def load(implementation: str) -> tuple[Run, str]:
    """Return an implementation by name: a peer's, or "kimi-linear:BACKEND"."""
    package, _, backend = implementation.partition(":")
    return load_ours(backend) if backend else LOADERS[package]()


class Calls:
    """The inputs of a case, and calls on them."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.inputs: list[Tensor] = []
        self.d_o = torch.empty(0)
        self.backward = False

    def load(self, folder: str, dtype: str, backward: bool) -> None:
        """Read the inputs; decays stay float32."""
        self.inputs = []
        for name in INPUTS:
            kind = torch.float32 if name == "log_decay" else getattr(torch, dtype)
            self.inputs.append(torch.tensor(np.load(f"{folder}/{name}.npy"), dtype=kind, requires_grad=backward))
        self.d_o = torch.tensor(np.load(f"{folder}/d_o.npy"), dtype=getattr(torch, dtype))
        self.backward = backward

    def call(self, inputs: list[Tensor], d_o: Tensor) -> list[Tensor]:
        """Run once; return o, the final state and, when asked for, the gradients."""
        with torch.set_grad_enabled(self.backward):
            o, state = self.run(*inputs)
        gradients = torch.autograd.grad(o, inputs, d_o) if self.backward else ()
        return [o.detach(), state.detach(), *gradients]

    def __call__(self) -> list[Tensor]:
        """Run once on all tokens."""
        return self.call(self.inputs, self.d_o)

    def warm_up(self, tokens: int = 64) -> None:
        """Run on the first tokens: starts thread pools and loads what is loaded on first use."""
        few = [x.detach()[:, :tokens].clone().requires_grad_(self.backward) for x in self.inputs]
        self.call(few, self.d_o[:, :tokens])


def turn(calls: Calls, min_seconds: float) -> list[float]:
    """Time calls until `min_seconds` have passed; a first call shorter than that finds cold caches and is left out."""
    times: list[float] = []
    started = time.perf_counter()
    while True:
        before = time.perf_counter()
        calls()
        now = time.perf_counter()
        times.append(now - before)
        if now - started >= min_seconds:
            return times[1:] or times


def resident_peak(calls: Calls) -> tuple[int, int] | None:
    """Return what one call adds to resident memory at its peak, and the bytes of its outputs; None off Linux."""
    if sys.platform != "linux":
        return None
    serving.forget_peak()
    before = serving.resident()
    outputs = calls()
    return serving.resident("VmHWM") - before, sum(x.nbytes for x in outputs)


def allocated_peak(calls: Calls) -> tuple[int, int]:
    """Return the peak of live bytes torch allocates during one call, and the bytes of its outputs.

    The profiler reports every allocation and release of torch's allocator, inside custom operators and native code too.
    A dispatch mode would not do: it sees a custom operator from outside, as one call.
    """
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        outputs = calls()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, sum(x.nbytes for x in outputs)


def save(calls: Calls, folder: str) -> None:
    """Run once and write o, the state and the gradients as float64."""
    for number, tensor in enumerate(calls()):
        np.save(f"{folder}/{number}.npy", tensor.double().numpy())


def handle(calls: Calls, request: dict[str, Any]) -> Any:
    """Carry out one command and return its answer."""
    match request["do"]:
        case "load":
            calls.load(request["folder"], request["dtype"], request["backward"])
            calls.warm_up()
            return None
        case "time":
            return turn(calls, request["min_seconds"])
        case "save":
            return save(calls, request["folder"])
        case "memory":
            return {"resident": resident_peak(calls), "allocated": allocated_peak(calls)}
    raise ValueError(f"unknown command {request['do']!r}")


def start(given: dict[str, Any]) -> tuple[serving.Handler, dict[str, Any]]:
    """Return the handler of an implementation, and what to say about it."""
    torch.set_num_threads(given["threads"])
    run, package_version = load(given["implementation"])
    calls = Calls(run)
    return lambda request: handle(calls, request), {"version": package_version, "torch": torch.__version__}


if __name__ == "__main__":
    serving.serve(start)
