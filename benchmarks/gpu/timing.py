"""How calls are timed: in turns, the L2 flushed before every call, the inputs rotated, medians of rounds.

On a GPU between events, without waiting for it between calls; in a rehearsal on the CPU by the clock.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

# A call of set number `index` of the rotated inputs.
Call = Callable[[int], object]
# More than the L2 of any GPU there is.
FLUSH_BYTES = 2**28


@dataclass(frozen=True)
class Effort:
    """How long is measured.

    Args:
        rounds: Turns of each contender; their order changes from round to round.
        turn_ms: A turn takes about this long, by the first call.
        most_calls: Calls of a turn at most.
        slowest_ms: What takes longer than this a call is not timed.
        host_calls: Calls the host's time is taken over.
    """

    rounds: int = 3
    turn_ms: float = 30.0
    most_calls: int = 20
    slowest_ms: float = 1500.0
    host_calls: int = 20


FULL = Effort()
REHEARSAL = Effort(rounds=1, turn_ms=0.0, most_calls=1, slowest_ms=60000.0, host_calls=1)


class HostClock:
    """Times calls on the CPU."""

    def times(self, call: Call, count: int) -> list[float]:
        """Return the milliseconds of each of `count` calls."""
        found = []
        for index in range(count):
            started = time.perf_counter()
            call(index)
            found.append(1e3 * (time.perf_counter() - started))
        return found

    def wait(self) -> None:
        """Wait for all calls: they have ended."""

    def host_us(self, call: Call, count: int) -> float:
        """Return the host's microseconds a call."""
        return 1e3 * statistics.median(self.times(call, count))

    def peak_bytes(self, call: Call) -> int | None:
        """Return by how much memory grows in a call, if that is known."""
        call(0)
        return None


class DeviceClock(HostClock):
    """Times calls between events of the GPU's stream."""

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def times(self, call: Call, count: int) -> list[float]:
        """Return the milliseconds of each call; nothing of the inputs is in the L2 when it begins."""
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for index, (start, end) in enumerate(pairs):
            self._flush.fill_(index)
            start.record()
            call(index)
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    def wait(self) -> None:
        """Wait for the GPU; raises what went wrong on it."""
        torch.cuda.synchronize()

    def host_us(self, call: Call, count: int) -> float:
        """Return the host's microseconds a call, the GPU idle before."""
        torch.cuda.synchronize()
        started = time.perf_counter()
        for index in range(count):
            call(index)
        taken = 1e6 * (time.perf_counter() - started) / count
        torch.cuda.synchronize()
        return taken

    def peak_bytes(self, call: Call) -> int | None:
        """Return by how much the peak of allocated memory exceeds what was allocated before a call."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(0)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


@dataclass
class Timing:
    """What a contender took: milliseconds, one a round; or why there are none."""

    ms: list[float] = field(default_factory=list)
    host_us: float | None = None
    peak_bytes: int | None = None
    reason: str = ""


def prepare(timing: Timing, call: Call, clock: HostClock, effort: Effort) -> int:
    """Warm up and take what is taken once; return how many calls a turn has."""
    # Compiles, loads, tunes; then the pool of the allocator grows to its size.
    for index in range(2):
        call(index)
    clock.wait()
    once = clock.times(call, 1)[0]
    if once > effort.slowest_ms:
        timing.reason = f"not timed: a call takes {once / 1e3:.1f} s"
        return 0
    timing.peak_bytes = clock.peak_bytes(call)
    timing.host_us = clock.host_us(call, effort.host_calls if once < 10 else 2)
    return max(1, min(effort.most_calls, int(effort.turn_ms / max(once, 1e-3))))


def compare(calls: dict[str, Call], clock: HostClock, effort: Effort, lost: Callable[[], bool]) -> dict[str, Timing]:
    """Time contenders in turns; one that fails has its reason, and the others go on unless the device is `lost`."""
    found = {name: Timing() for name in calls}
    counts: dict[str, int] = {}
    for name, call in calls.items():
        attempt(
            found[name], lambda call=call, name=name: counts.update({name: prepare(found[name], call, clock, effort)})
        )
        if found[name].reason and lost():
            return give_up(found, name)
    able = [name for name in calls if counts.get(name)]
    for number in range(effort.rounds):
        # Another one begins every round.
        for name in able[number % max(1, len(able)) :] + able[: number % max(1, len(able))]:
            timing = found[name]
            if not timing.reason:
                attempt(timing, lambda n=name: found[n].ms.append(statistics.median(clock.times(calls[n], counts[n]))))
                if timing.reason and lost():
                    return give_up(found, name)
    return found


def attempt(timing: Timing, action: Callable[[], Any]) -> None:
    """Do something; an error becomes the reason."""
    try:
        action()
    except Exception as error:
        timing.ms, timing.reason = [], sentence(error)


def give_up(found: dict[str, Timing], culprit: str) -> dict[str, Timing]:
    """Drop what a lost device has left: only the culprit's reason is known."""
    for name, timing in found.items():
        if name != culprit:
            timing.ms, timing.reason = [], timing.reason or f"{LOST} by {culprit}"
    return found


LOST = "the GPU was lost"


def sentence(error: BaseException) -> str:
    """Return an error as one line for a table."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = " ".join(str(error).splitlines()[:2]) or "no message"
    return f"{type(error).__name__}: {text}"[:300]


def captured(call: Call, sets: int) -> Call:
    """Return a call that replays a CUDA graph of the given one, a graph for each set of inputs."""
    graphs = []
    stream = torch.cuda.Stream()
    for index in range(sets):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call(index)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = call(index)
        # The outputs stay alive with the graph that writes them.
        graphs.append((graph, kept))
    return lambda index: graphs[index % sets][0].replay()
