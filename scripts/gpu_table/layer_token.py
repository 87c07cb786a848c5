"""The decode step of a whole Kimi Delta Attention layer between its projections."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from gpu_table.meta import empty
from kimi_linear.ops.delta_rule.triton import layer_token

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def step(
    D: int, group: int, dtype: torch.dtype, state: torch.dtype, W: int = 4, bounded: bool = False, turned: bool = False
) -> None:
    """Run one step of 8 key heads without memory.

    bounded: the other gates and no optional parameter; turned: pools whose last two axes lie the other way round.
    """
    N, H, HV, S = 4, 8, 8 * group, 16
    heads = ((H, D), (H, D), (HV, D), (HV, D), (HV,), (HV, D))
    rows = tuple(empty(N, *shape, dtype=dtype) for shape in heads)
    channels = (H * D, H * D, HV * D)
    taps = tuple(empty(c, W, dtype=dtype) for c in channels)
    parameters = (None, None) if bounded else (empty(HV), empty(HV * D))
    pools = (*(empty(S, c, W - 1, dtype=dtype) for c in channels), empty(S, HV, D, D, dtype=state))
    if turned:
        pools = tuple(torch.empty(x.mT.shape, dtype=x.dtype, device=x.device).mT for x in pools)
    slots = empty(N, dtype=torch.int64)
    weights = (*taps, *parameters, empty(D, dtype=dtype))
    layer_token.layer_token(rows, weights, pools, slots, -5.0 if bounded else None, 1.0, D**-0.5, 1e-5, bounded)


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Return every call of the table by name."""
    for D in (128, 64, 256):
        for dtype in DTYPES:
            for group in (1, 2):
                for state in (torch.float32, torch.bfloat16):
                    name = f"D={D} {str(dtype)[6:]} group={group} state={str(state)[6:]}"
                    given = (D, group, dtype, state)
                    if dtype == state or dtype == torch.float32:
                        yield f"{name} turned", lambda given=given: step(*given, turned=True)
                    yield name, lambda given=given: step(*given)
        for dtype in DTYPES[::2]:
            for W in (1, 16):
                given = (D, 2, dtype, torch.float32, W, True)
                yield f"D={D} {str(dtype)[6:]} W={W} bounded", lambda given=given: step(*given)
