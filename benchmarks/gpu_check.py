"""Run the operators on a GPU: correctness first, then speed. Says so and stops where there is none.

python benchmarks/gpu_check.py [--dry-run]     what `make gpu-check` runs
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch

import gate
from kimi_linear.base.errors import BackendError
from kimi_linear.base.numerics import TOLERANCES, relative_error
from kimi_linear.ops import OPS, kda
from kimi_linear.recipes.bench.cases import Case, make_inputs

DEVICE = "cuda"
NO_GPU = "no GPU: torch.cuda is not available here, so nothing was checked."
DTYPES = ("float32", "bfloat16")
# Small enough for the reference, with a ragged last chunk and several heads.
CHECKS = [Case(T, dtype, backward=True, B=2, H=4, K=64, V=64) for dtype in DTYPES for T in (1, 63, 200)]
SHAPES = ((1, 8192, 96), (1, 8192, 64), (1, 8192, 16), (2, 16384, 16), (4, 2048, 16), (1, 65536, 32))
SPEEDS = [Case(T, "bfloat16", backward, B=B, H=H) for B, T, H in SHAPES for backward in (False, True)]
FLUSH_BYTES = 2**28


def inputs_on(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return a case's inputs on the GPU; decays are float32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    made = make_inputs(case).items()
    return [x.to(DEVICE, wide if name == "log_decay" else dtype).requires_grad_(case.backward) for name, x in made]


def call(inputs: list[torch.Tensor], backend: str, backward: bool) -> list[torch.Tensor]:
    """Run once; return the output, the final state and the gradients."""
    with torch.set_grad_enabled(backward):
        o, state = kda(*inputs, backend=backend)
    gradients = torch.autograd.grad(o, inputs, torch.ones_like(o)) if backward else ()
    return [o.detach(), state.detach(), *gradients]


def check(case: Case, backend: str) -> str:
    """Compare a backend on the GPU with the float64 reference on the CPU; return what is wrong, or ""."""
    dtype = getattr(torch, case.dtype)
    on_gpu = inputs_on(case, dtype)
    # The reference gets the values the GPU got, rounded as they were.
    wide = [x.detach().cpu().double().requires_grad_() for x in on_gpu]
    expected = call(wide, "reference", case.backward)
    allowed = TOLERANCES[case.dtype]
    limits = [allowed.output] * 2 + [allowed.gradient] * 3 + [allowed.gate_gradient] * 2
    names = ("o", "final state", "d_q", "d_k", "d_v", "d_log_decay", "d_beta")
    found = call(on_gpu, backend, case.backward)
    for name, x, y, limit in zip(names, found, expected, limits, strict=True):
        if (error := relative_error(x.cpu(), y)) > limit:
            return f"{name} is off by {error:.1e}, allowed {limit:.1e}"
    return ""


def elapsed(run: Callable[[], object], rounds: int = 20) -> list[float]:
    """Return the milliseconds of each call, between events, its inputs not in the cache."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=DEVICE)
    times = []
    for index in range(rounds + 3):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        # The first calls load kernels and grow the allocator's pool.
        if index >= 3:
            times.append(start.elapsed_time(end))
    return times


def refusal(backend: str) -> str:
    """Return why a backend cannot run on the GPU, or ""."""
    case = Case(4, "float32", backward=False, H=1, K=16, V=16)
    try:
        kda(*inputs_on(case, torch.float32), backend=backend)
    except BackendError as error:
        return str(error).splitlines()[0]
    return ""


def check_all(backends: list[str]) -> bool:
    """Check every backend on every small case, and the tests marked for a GPU; print a line each."""
    green = True
    for backend in backends:
        for case in CHECKS:
            problem = check(case, backend)
            green &= not problem
            print(f"{backend:10} {case.label:40} {problem or 'ok'}")
    verdict = gate.run_tests("-m", "gpu", paths=("tests",))
    print(f"tests marked gpu: {'there are none' if verdict.empty else verdict.output or 'ok'}")
    return green and (verdict.green or verdict.empty)


def time_all(backends: list[str]) -> None:
    """Print the speed of every backend that is not the reference, on the shapes kernels are compared by."""
    for case in SPEEDS:
        inputs = inputs_on(case, torch.bfloat16)
        for backend in backends:
            if backend == "reference":
                continue
            times = elapsed(partial(call, inputs, backend, case.backward))
            low, middle, high = statistics.quantiles(times, n=4)
            per = middle * 1e6 / case.token_heads
            shape = f"B={case.B} H={case.H} {case.label}"
            spread = f"({low:.3f} to {high:.3f})"
            print(f"{backend:10} {shape:44} {middle:9.3f} ms {spread} {per:8.2f} ns per token-head")


def show_plan() -> None:
    """Print what would run."""
    for case in CHECKS:
        print(
            f"check  B={case.B} H={case.H} K={case.K} {case.label}: outputs and gradients against the float64 reference"
        )
    print("test   pytest -m gpu tests")
    for case in SPEEDS:
        print(f"time   B={case.B} H={case.H} K={case.K} {case.label}: events, cache flushed, median of 20")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and run nothing")
    if parser.parse_args().dry_run:
        show_plan()
        return 0
    if not torch.cuda.is_available():
        print(NO_GPU)
        return 0
    properties = torch.cuda.get_device_properties(0)
    print(f"{properties.name}, {properties.multi_processor_count} multiprocessors, torch {torch.__version__}")
    names = [backend.name for backend in OPS["delta_rule"].backends]
    refusals = {name: refusal(name) for name in names}
    for name, reason in refusals.items():
        if reason:
            print(f"{name:10} cannot: {reason}")
    able = [name for name in names if not refusals[name]]
    if not check_all(able):
        print("not timed: a check failed.", file=sys.stderr)
        return 1
    time_all(able)
    return 0


if __name__ == "__main__":
    sys.exit(main())
