"""How things are timed: in turns, so that whatever else the machine does falls on all of them; medians count."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Call = Callable[[], object]


@dataclass(frozen=True)
class Effort:
    """How long a measurement may take.

    Args:
        rounds: Turns of each participant.
        turn_seconds: A turn lasts at least this long, or one call.
        budget_seconds: A participant that has used this much has no further turns.
    """

    rounds: int
    turn_seconds: float
    budget_seconds: float


FULL = Effort(rounds=5, turn_seconds=0.2, budget_seconds=6.0)
QUICK = Effort(rounds=3, turn_seconds=0.05, budget_seconds=1.5)


@dataclass(frozen=True)
class Spread:
    """The median of the turns and their quartiles."""

    low: float
    median: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Return lower quartile, median and upper quartile.

    Example:
        >>> spread([3.0, 1.0, 2.0])
        Spread(low=1.5, median=2.0, high=2.5)
    """
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(low, middle, high)


def turn(call: Call, min_seconds: float) -> float:
    """Return the median time of a call over at least `min_seconds`.

    A first call shorter than that finds cold caches and is left out.
    """
    times: list[float] = []
    started = time.perf_counter()
    while True:
        before = time.perf_counter()
        call()
        now = time.perf_counter()
        times.append(now - before)
        if now - started >= min_seconds:
            return statistics.median(times[1:] or times)


def in_turns(calls: Mapping[str, Call], effort: Effort, advance: Call = lambda: None) -> dict[str, list[float]]:
    """Time calls round after round (A B A B) and return each one's turns; the first round is not counted.

    Args:
        calls: What to time, by name.
        effort: How long.
        advance: Called after every turn, `rounds + 1` times a participant.

    Example:
        >>> times = in_turns({"a": lambda: sum(range(9)), "b": lambda: None}, Effort(3, 0.0, 1.0))
        >>> [len(turns) for turns in times.values()]
        [3, 3]
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    for name, call in calls.items():
        before = time.perf_counter()
        call()
        # One call may use up the budget: then it is the measurement, and says so by being the only one.
        if (taken := time.perf_counter() - before) > effort.budget_seconds:
            seconds[name].append(taken)
        advance()
    for _ in range(effort.rounds):
        for name, call in calls.items():
            if sum(seconds[name]) < effort.budget_seconds:
                seconds[name].append(turn(call, effort.turn_seconds))
            advance()
    return seconds
