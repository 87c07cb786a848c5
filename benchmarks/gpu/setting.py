"""Where and with which backends a benchmark runs: on a GPU, or rehearsed on the CPU, or only built."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gpu import timing
from gpu.shapes import Case

WIDE = torch.float32


@dataclass(frozen=True)
class Setting:
    """One way to run the benchmarks.

    Args:
        device: "cuda"; "cpu" for a rehearsal; "meta" to build every call without memory.
        ours: The backend that is measured.
        plain: The backend it is held against.
        sets: Sets of inputs that calls rotate through.
        effort: How long is measured.
    """

    device: str
    ours: str
    plain: str
    sets: int
    effort: timing.Effort

    @property
    def on_gpu(self) -> bool:
        """Whether this is the real thing."""
        return self.device == "cuda"

    def clock(self) -> timing.HostClock:
        """Return what times here."""
        return timing.DeviceClock() if self.on_gpu else timing.HostClock()

    def case(self, case: Case) -> Case:
        """Return a case as it is run here."""
        return case.tiny() if self.device == "cpu" else case

    def normal(self, *shape: int, dtype: torch.dtype | str = WIDE, scale: float = 1.0) -> Tensor:
        """Draw standard normal numbers; the same for the same sequence of calls after a seed."""
        kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        if self.device == "meta":
            return torch.empty(shape, dtype=kind, device="meta")
        return torch.randn(shape, dtype=kind, device=self.device).mul_(scale)

    def lost(self) -> bool:
        """Whether the GPU no longer answers this process."""
        if not self.on_gpu:
            return False
        try:
            torch.cuda.synchronize()
        except Exception:
            return True
        return False


GPU = Setting("cuda", "triton", "chunk", 3, timing.FULL)
REHEARSAL = Setting("cpu", "chunk", "reference", 2, timing.REHEARSAL)
BUILD = Setting("meta", "triton", "chunk", 1, timing.REHEARSAL)
SETTINGS = {setting.device: setting for setting in (GPU, REHEARSAL, BUILD)}
