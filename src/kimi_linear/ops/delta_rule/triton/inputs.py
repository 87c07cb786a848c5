"""The tensors of a call, and what its kernels are compiled for."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NOTHING, GIVEN, WEIGHED = 0, 1, 2


@dataclass(frozen=True)
class Inputs:
    """A call's tensors, [tokens, heads, dim], and what the kernels are compiled for; gates as in `kda_core`.

    beta is a strength, or with `raw` a logit; with `raw`, q and k are normalised inside and g holds the gate's logits.
    """

    q: Tensor
    k: Tensor
    erase: Tensor | None
    value: Tensor
    g: Tensor
    beta: Tensor | None
    A_log: Tensor | None
    dt_bias: Tensor | None
    initial: Tensor | None
    scale: float
    raw: bool = False
    lower_bound: float | None = None
    beta_scale: float = 1.0
    pre: bool = False

    @property
    def heads(self) -> tuple[int, int, int]:
        """H, HV, and the erase key's heads (1 without one)."""
        return self.q.shape[1], self.value.shape[1], 1 if self.erase is None else self.erase.shape[1]

    @property
    def flags(self) -> dict[str, Any]:
        """What the preparation is compiled for."""
        gate = 0 if not self.raw else 1 if self.lower_bound is None else 2
        return {
            "NORM": self.raw,
            "GATE": gate,
            "BETA": 0 if self.beta is None else 2 if self.raw else 1,
            "ERASE": GIVEN if self.erase is not None else NOTHING if self.beta is None else WEIGHED,
            "SCALAR": self.g.dim() == 2,
            "PRE": self.pre,
            "HAS_RATE": self.A_log is not None,
            "HAS_BIAS": self.dt_bias is not None,
            "WIDE": self.value.dtype == torch.float32,
        }
