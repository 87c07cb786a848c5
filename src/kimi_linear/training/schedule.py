"""Learning-rate schedules as pure functions of progress, the fraction of the budget used: steps or time alike.

Each returns a multiplier of the peak rate in [0, 1]. WSD (warm up, stay, decay) is the one Kimi K2 and Kimi Linear
trained with (arXiv:2507.20534 §2.5, arXiv:2510.26692 §5.2). No torch here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from kimi_linear.base.errors import ConfigError
from kimi_linear.base.registry import unknown_name

Schedule = Callable[[float], float]


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Shape of the learning rate over a run; fractions are of the whole budget.

    `decay` is read by "wsd" alone: "cosine" decays from the end of the warm-up. Kimi Linear's own fractions are not
    published; the defaults are Kimi K2's (10 of 15.5 trillion tokens at the peak, then down to a tenth).
    """

    name: str = "wsd"
    warmup: float = 0.02
    decay: float = 0.355
    final: float = 0.1

    def __post_init__(self) -> None:
        if self.name not in _SCHEDULES:
            raise ConfigError(f"schedule.name: {unknown_name('schedule', self.name, list(_SCHEDULES))}")
        for field in ("warmup", "decay", "final"):
            value = getattr(self, field)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"schedule.{field} is {value}, expected a fraction from 0 to 1.")
        if self.name == "wsd" and self.warmup + self.decay > 1.0:
            raise ConfigError(
                f"schedule.warmup {self.warmup} and schedule.decay {self.decay} add up to more than 1; shorten one."
            )


def wsd(progress: float, *, warmup: float, decay: float, final: float) -> float:
    """Return the warm-up, stable, decay multiplier at a point of the run.

        lr(T) / peak = T / T_w                                                      T <  T_w
                       1                                                     T_w <= T <= T_s
                       final + (1 - final) / 2 * (1 + cos(pi (T - T_s) / (1 - T_s)))  T > T_s
        with T_w = warmup and T_s = 1 - decay; the function is continuous at both.

    Args:
        progress: Fraction of the budget used, clamped to [0, 1].
        warmup: Fraction spent rising from 0.
        decay: Fraction spent falling to `final`, at the end.
        final: Multiplier at the end.

    Returns:
        Multiplier of the peak rate, in [0, 1].

    Example:
        >>> wsd(0.5, warmup=0.1, decay=0.2, final=0.1)
        1.0
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < warmup:
        return progress / warmup
    stable_end = 1.0 - decay
    if progress <= stable_end:
        return 1.0
    return _half_cosine((progress - stable_end) / decay, final)


def cosine(progress: float, *, warmup: float, final: float) -> float:
    """Return the cosine multiplier: up linearly over `warmup`, then half a cosine from 1 down to `final`.

        lr(T) / peak = T / T_w                                                      T <  T_w
                       final + (1 - final) / 2 * (1 + cos(pi (T - T_w) / (1 - T_w)))  otherwise

    Args:
        progress: Fraction of the budget used, clamped to [0, 1].
        warmup: Fraction spent rising from 0.
        final: Multiplier at the end.

    Returns:
        Multiplier of the peak rate, in [0, 1].

    Example:
        >>> cosine(0.5, warmup=0.0, final=0.0)
        0.5
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < warmup:
        return progress / warmup
    if warmup == 1.0:
        return 1.0
    return _half_cosine((progress - warmup) / (1.0 - warmup), final)


def build_schedule(config: ScheduleConfig) -> Schedule:
    """Return the multiplier as a function of progress alone.

    Example:
        >>> build_schedule(ScheduleConfig(warmup=0.5, decay=0.5))(0.25)
        0.5
    """
    return _SCHEDULES[config.name](config)


def _half_cosine(fraction: float, final: float) -> float:
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * fraction))


_SCHEDULES: dict[str, Callable[[ScheduleConfig], Schedule]] = {
    "wsd": lambda config: lambda p: wsd(p, warmup=config.warmup, decay=config.decay, final=config.final),
    "cosine": lambda config: lambda p: cosine(p, warmup=config.warmup, final=config.final),
    "constant": lambda config: lambda p: wsd(p, warmup=config.warmup, decay=0.0, final=1.0),
}
