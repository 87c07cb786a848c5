"""What is done in which order, and for how long: the steps, the cases by importance, and the budget of time."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gpu.shapes import GROUPS, Case

STEPS = ("contracts", "ceilings", *GROUPS)
BUDGET = 540.0
# Of the budget, for what comes before the times: contracts beside compiling, or compiling alone.
CONTRACTS_SHARE, COMPILING_SHARE = 0.45, 0.2
# For the record, the page and the plots.
RESERVE = 20.0
# Seconds of a case, kernels compiled, with all its contenders; and after how many it is stopped.
CASE_SECONDS = {"kda": 3.0, "decode": 2.0, "layer": 6.0, "operators": 3.0}
CASE_LIMIT = 75.0


@dataclass
class Budget:
    """Seconds to spend, and how many are left."""

    total: float = BUDGET
    now: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._started = self.now()

    @property
    def used(self) -> float:
        """Seconds since the start."""
        return self.now() - self._started

    @property
    def left(self) -> float:
        """Seconds for measuring: what is kept for the end is not among them."""
        return self.total - RESERVE - self.used

    def allows(self, case: Case) -> bool:
        """Whether a case can be begun."""
        return self.left >= CASE_SECONDS[case.section]

    def limit(self) -> float:
        """Return after how many seconds a case that was begun is stopped."""
        return max(5.0, min(CASE_LIMIT, self.left))

    def before_times(self, with_contracts: bool) -> float:
        """Return the seconds for what comes before the times."""
        return max(0.0, min(self.left, self.total * (CONTRACTS_SHARE if with_contracts else COMPILING_SHARE)))


def chosen(only: tuple[str, ...]) -> tuple[str, ...]:
    """Return the steps to take, in their order; none named means all.

    Raises:
        KeyError: There is no such step.
    """
    if unknown := sorted(set(only) - set(STEPS)):
        raise KeyError(f"there is no step {unknown[0]!r}; choose from {', '.join(STEPS)}")
    return tuple(step for step in STEPS if step in only) if only else STEPS


def cases(steps: tuple[str, ...]) -> Iterator[Case]:
    """Yield the cases of the steps, the most important first."""
    for step in steps:
        yield from GROUPS.get(step, ())


def estimate(steps: tuple[str, ...], budget: float) -> float:
    """Return the seconds the steps should take."""
    share = CONTRACTS_SHARE if "contracts" in steps else COMPILING_SHARE
    return share * budget + sum(CASE_SECONDS[case.section] for case in cases(steps)) + RESERVE
