"""Verification of drafts, by name of the operator: what its tests share."""

from typing import Any

import torch
from torch import Tensor

from kimi_linear.ops import Trace, delta_rule_verify, kda_core_verify
from support import ops
from support.delta_rule import draw

VERIFY = {"delta_rule": delta_rule_verify, "kda_core": kda_core_verify}
# Three tokens of two sequences.
SHAPE: dict[str, Any] = {"T": 3, "B": 2, "H": 1, "HV": 2}


def inputs_of(case: Any, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Any], Tensor]:
    """Return the arguments of a case but for its state, and the state, on the device under test."""
    x = {n: x.to(ops.DEVICE) if isinstance(x, Tensor) else x for n, x in draw(case, dtype).items()}
    del x["cu_seqlens"]
    return x, x.pop("initial_state")


def named(*slots: int) -> Tensor:
    """Return integers on the device under test."""
    return torch.tensor(slots, device=ops.DEVICE)


def verify(op: str, inputs: dict[str, Any], pool: Tensor, slots: Tensor, backend: str | None) -> tuple[Tensor, Trace]:
    """Verify a draft."""
    return VERIFY[op](**inputs, pool=pool, slots=slots, backend=backend)


def bits(x: Tensor) -> Tensor:
    """View a floating tensor as integers."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
