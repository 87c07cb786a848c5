"""The operator alone: many tokens at once, over shapes and dtypes, and single tokens on states that lie in memory."""

from collections.abc import Callable, Iterator

import torch

from kimi_linear.base.errors import BackendError
from kimi_linear.ops import OPS, kda
from kimi_linear.ops.delta_rule import delta_rule_decode, kda_core_decode
from kimi_linear.ops.registry import Call
from kimi_linear.recipes.bench.cases import Case, cast_inputs, main_cases, sweep_cases
from kimi_linear.recipes.bench.ceilings import Memory
from kimi_linear.recipes.bench.record import Row
from kimi_linear.recipes.bench.selfcheck import able_backends
from kimi_linear.recipes.bench.timing import Effort, in_turns, spread

UNIT = "us per token-head per core"
# States together larger than any last-level cache, so that each one comes from memory and goes back there.
COLD_BYTES = 2**29
COLD_BATCHES = (1, 16)
# The copy that takes turns with the backends.
COPY = "copy"


def ceiling_of(dtype: str) -> str:
    """Return the ceiling that the recurrence is held to: multiply-adds for float32, dot products for bfloat16."""
    return "dot_bfloat16" if dtype == "bfloat16" else "fma_float32"


def refusal(backend: str, case: Case) -> str:
    """Return why a backend cannot run a case, or ""."""
    few = Case(4, case.dtype, case.backward, case.B, case.H, case.K, case.V)
    return why_not(lambda: kda(*cast_inputs(few), backend=backend), backend)


def why_not(call: Callable[[], object], backend: str) -> str:
    """Make a call and return why the backend refused it, or ""."""
    try:
        call()
    except BackendError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        said = [line for line in lines if line.startswith(f"{backend}: cannot: ")]
        return said[0].removeprefix(f"{backend}: ") if said else lines[0]
    return ""


def our_backends(case: Case) -> Iterator[tuple[str, str]]:
    """Yield the name of every backend that runs calls unasked, with its reason to refuse the case, or ""."""
    for backend in OPS["delta_rule"].backends:
        if backend.by_name_only(Call("cpu", case.dtype, needs_grad=False)):
            continue
        yield backend.name, refusal(backend.name, case)


def bound_call(backend: str, case: Case) -> Callable[[], object]:
    """Return a function that runs a case once, with its gradients if it takes them."""
    inputs = cast_inputs(case)
    d_o = torch.randn(case.B, case.T, case.H, case.V, generator=torch.Generator().manual_seed(1)).to(inputs[2].dtype)

    def run() -> object:
        with torch.set_grad_enabled(case.backward):
            o, state = kda(*inputs, backend=backend)
        return torch.autograd.grad(o, inputs, d_o) if case.backward else (o, state)

    return run


def operator_row(engine: str, case: Case, seconds: list[float], version: str = "", reason: str = "") -> Row:
    """Return the row of an engine on a case, from the seconds of its turns."""
    threads = torch.get_num_threads()
    row = Row("operators", engine, case.as_dict(), UNIT, version=version, reason=reason, ceiling=ceiling_of(case.dtype))
    row.values = [1e6 * s * threads / case.token_heads for s in seconds]
    row.achieved = 1e-9 * case.flop / spread(seconds).median if seconds else None
    return row


def measure_case(case: Case, effort: Effort) -> list[Row]:
    """Measure every backend but the reference on a case, in turns."""
    able = {name: reason for name, reason in our_backends(case) if name != "reference"}
    calls = {name: bound_call(name, case) for name, reason in able.items() if not reason}
    seconds = in_turns(calls, effort)
    return [
        operator_row(f"kimi-linear:{name}", case, seconds.get(name, []), reason=reason) for name, reason in able.items()
    ]


def sweep(quick: bool, effort: Effort, main: bool = True) -> Iterator[list[Row]]:
    """Yield the rows of each case: those of the sweep, and of the main comparison unless others measure that."""
    for case in [*(main_cases(quick) if main else []), *sweep_cases(quick)]:
        yield measure_case(case, effort)


def decode_rows(effort: Effort, H: int = 8, K: int = 128, cold_bytes: int = COLD_BYTES) -> Iterator[Row]:
    """Yield the rows of one step of N sequences whose states are cold, for every backend, operator and N."""
    state_bytes = 4 * H * K * K
    slots = max(max(COLD_BATCHES), cold_bytes // state_bytes)
    pool, memory = torch.randn(slots, H, K, K).mul_(0.1), Memory()
    for name in ("delta_rule_decode", "kda_core_decode"):
        for N in COLD_BATCHES:
            case = {"operator": name, "N": N, "heads": H, "K": K}
            calls = {backend: cold_pass(name, backend, pool, N) for backend in able_backends(name)}
            few = {backend: cold_pass(name, backend, pool[:N], N) for backend in calls}
            reasons = {backend: why_not(few[backend], backend) for backend in calls}
            able = {backend: call for backend, call in calls.items() if not reasons[backend]}
            turns = in_turns({**able, COPY: memory.copy_once}, effort)
            ceiling = 2e-9 * memory.size / spread(turns[COPY]).median
            for backend, reason in reasons.items():
                rates = [2e-9 * state_bytes * (slots // N * N) / s for s in turns.get(backend, [])]
                row = Row("decode update", f"kimi-linear:{backend}", case, "GB/s", rates, reason=reason)
                row.achieved, row.ceiling = (spread(rates).median if rates else None), "copy_gigabytes"
                row.ceiling_rate = ceiling
                yield row


def cold_pass(name: str, backend: str, pool: torch.Tensor, N: int) -> Callable[[], object]:
    """Return a function that advances every state of the pool by one token, N neighbours a call."""
    _, H, K, _ = pool.shape
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(N, H, K, generator=generator) for _ in range(4))
    beta = torch.randn(N, H, generator=generator)
    groups = [torch.arange(start, start + N) for start in range(0, len(pool) - N + 1, N)]
    if name == "kda_core_decode":
        rate, bias = torch.zeros(H), torch.zeros(H * K)
        given: tuple[torch.Tensor, ...] = (q, k, v, g, beta, rate, bias)
        step: Callable[..., object] = kda_core_decode
    else:
        unit = torch.nn.functional.normalize(k, dim=-1)
        given = (q, unit, unit * torch.sigmoid(beta).unsqueeze(-1), v, torch.nn.functional.logsigmoid(g))
        step = delta_rule_decode

    @torch.inference_mode()
    def run() -> None:
        for slots in groups:
            step(*given, pool, slots, backend=backend)

    return run
