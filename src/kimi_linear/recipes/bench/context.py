"""What one more token costs behind ever longer contexts: the hybrid, and full attention of the same shape.

The caches are filled with random numbers instead of by reading a text: what a step costs depends on how much is
remembered, not on what. Weights and caches are bfloat16. One model's cache is there at a time.
"""

import time
from collections.abc import Iterator

import torch

from kimi_linear.evaluation.decode_cost import filled_cache
from kimi_linear.recipes.bench.ceilings import Memory
from kimi_linear.recipes.bench.engine import Engine, build, named_config
from kimi_linear.recipes.bench.machine import memory_bytes
from kimi_linear.recipes.bench.record import Row
from kimi_linear.recipes.bench.timing import spread

WEIGHTS = "bfloat16"
# Beside the cache: the buffers of a step.
SPARE_BYTES = 2**30
WARM_UP = 2
# Memory is read for so long before and after the steps.
READ_SECONDS = 0.2


def contexts(quick: bool) -> list[int]:
    """Return the context lengths of a run."""
    return [1024, 16384] if quick else [1024, 4096, 16384, 65536, 262144, 1048576]


def variants(size: str) -> list[str]:
    """Return the networks compared: the hybrid, latent attention and grouped-query attention everywhere."""
    return [size, f"{size}-mla", f"{size}-gqa"]


@torch.inference_mode()
def step_seconds(engine: Engine, context: int, steps: int, budget: float) -> list[float]:
    """Return the seconds of single steps behind a context; the first ones are not counted."""
    cache = filled_cache(engine.model, context, room=steps + WARM_UP)
    token, seconds = torch.zeros(1, 1, dtype=torch.int64), []
    for _ in range(steps + WARM_UP):
        before = time.perf_counter()
        engine.model(token, cache=cache, last_only=True)
        seconds.append(time.perf_counter() - before)
        if sum(seconds) > budget and len(seconds) > WARM_UP:
            break
    return seconds[WARM_UP:]


def measure(size: str, lengths: list[int], steps: int = 16, budget: float = 8.0) -> Iterator[Row]:
    """Yield one row for each network and context; one that memory has no room for says so.

    Args:
        size: A preset, without a variant.
        lengths: Tokens remembered.
        steps: Steps timed.
        budget: Seconds of steps after which no further one is begun.
    """
    # All weights are there from the start, so that building them falls between no two readings.
    engines = {name: Engine(build(named_config(name)), WEIGHTS) for name in variants(size)}
    memory = Memory()
    for context in lengths:
        for name, engine in engines.items():
            config = engine.config
            cache_bytes = config.state_bytes(context, 2)
            row = Row("context", name, {"context": context}, "ms per token", extra={"cache_bytes": cache_bytes})
            free = memory_bytes("MemAvailable")
            needed = cache_bytes + SPARE_BYTES
            if free and needed > free:
                row.reason = f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
            else:
                before = memory.read(READ_SECONDS)
                seconds = step_seconds(engine, context, steps, budget)
                row.values = [1e3 * s for s in seconds]
                row.achieved = 1e-9 * (2 * config.active_parameters() + cache_bytes) / spread(seconds).median
                row.ceiling, row.ceiling_rate = "read_gigabytes", max(before, memory.read(READ_SECONDS))
            yield row
