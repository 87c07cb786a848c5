"""Short prompts, verification of drafts and their replay, and decoding on a bfloat16 pool."""

from collections.abc import Callable, Iterator

import torch

from gpu_table.delta_rule import DTYPES, variants
from gpu_table.meta import empty
from kimi_linear.ops.delta_rule.triton import decode, tokens

T = 8
POOLS = (torch.float32, torch.bfloat16)


def replayed(D: int, H: int, scalar: bool, pool: torch.Tensor, slots: torch.Tensor) -> None:
    """Run the replay of a trace."""
    N = slots.shape[0]
    shape = (N, T, H) if scalar else (N, T, H, D)
    tokens.replay(empty(*shape), empty(N, T, H, D), empty(N, T, H, D), slots, pool, slots)


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Return every call of the table by name: few sequences and many."""
    for D in (128, 64, 256):
        for N in (1, 256):
            slots = empty(N, dtype=torch.int32)
            for held in POOLS:
                pool = empty(N, 8, D, D, dtype=held)
                where = f"D={D} N={N} pool={str(held)[6:]}"
                for scalar in (False, True):
                    name = f"{where} replay{' scalar' if scalar else ''}"
                    yield name, lambda D=D, n=scalar, p=pool, s=slots: replayed(D, 8, n, p, s)
                for dtype in DTYPES:
                    for kind, x in variants(8, N * T, D, D, dtype).items():
                        name = f"{where} {str(dtype)[6:]} verify {kind}"
                        yield name, lambda x=x, p=pool, s=slots: tokens.verify(x, p, s, T)
                    for kind, x in variants(8, N, D, D, dtype).items():
                        name = f"{where} {str(dtype)[6:]} decode {kind}"
                        yield name, lambda x=x, p=pool, s=slots: decode.decode(x, p, s)
            for dtype in DTYPES:
                for kind, x in variants(8, N * T, D, D, dtype).items():
                    name = f"D={D} N={N} {str(dtype)[6:]} forward {kind}"
                    yield name, lambda x=x, N=N: tokens.forward(x, N, T)
