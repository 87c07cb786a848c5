"""A process that measures when told to, one JSON line a command: a GPU it loses is lost to it alone."""

import os
from typing import Any

import torch

import serving
from gpu import ceilings, machine, measure, timing
from gpu.setting import SETTINGS, Setting
from gpu.shapes import case_of


class Bench:
    """Answers the commands facts, ceilings, warm and measure."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        # Made when first needed: who only compiles needs no memory to flush.
        self._clock: timing.HostClock | None = None

    @property
    def clock(self) -> timing.HostClock:
        """What times."""
        self._clock = self._clock or self.setting.clock()
        return self._clock

    def __call__(self, command: dict[str, Any]) -> Any:
        """Do what a command says."""
        match command["do"]:
            case "facts":
                return machine.describe(command.get("commit", ""))
            case "ceilings":
                return ceilings.measure(self.setting) | {"clocks": machine.clocks()}
            case "warm":
                case, skip = case_of(command["section"], command["case"]), tuple(command["skip"])
                return measure.warm(case, self.setting, skip)
            case "measure":
                case, skip = case_of(command["section"], command["case"]), tuple(command["skip"])
                return measure.measure(case, self.setting, self.clock, skip)
        raise ValueError(f"unknown command {command['do']!r}")


# fla would keep what it tunes while other processes are on the GPU: it tunes where it is timed.
os.environ.setdefault("FLA_CACHE_RESULTS", "0")


def start(given: dict[str, Any]) -> tuple[serving.Handler, dict[str, Any]]:
    """Return what answers."""
    setting = SETTINGS[given["device"]]
    if setting.on_gpu:
        torch.cuda.init()
    return Bench(setting), {}


if __name__ == "__main__":
    serving.serve(start)
