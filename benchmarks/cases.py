"""What is measured: the shapes, the inputs, and how many floating-point operations a call counts for.

B batch, T tokens, H heads, K key dim, V value dim, as everywhere; a token-head is one token of one head.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

INPUTS = ("q", "k", "v", "log_decay", "beta")
# What a time is divided by: the recurrence token by token, an add and a multiply counting two. Forward: decay the
# state, read it with the erase key, write, read it with the query: 7 K V. Backward, states recomputed: 20 K V.
FORWARD_FLOP = 7
BACKWARD_FLOP = 20


@dataclass(frozen=True)
class Case:
    """One call of Kimi Delta Attention: its sizes, the dtype of q, k, v and beta, and whether gradients are taken."""

    T: int
    dtype: str
    backward: bool
    B: int = 1
    H: int = 8
    K: int = 128
    V: int = 128

    @property
    def token_heads(self) -> int:
        """B T H."""
        return self.B * self.T * self.H

    @property
    def flop(self) -> int:
        """Floating-point operations of the recurrent form."""
        per_token_head = (FORWARD_FLOP + (BACKWARD_FLOP if self.backward else 0)) * self.K * self.V
        return self.token_heads * per_token_head

    @property
    def label(self) -> str:
        """A name for people."""
        return f"T={self.T} {self.dtype} {'forward+backward' if self.backward else 'forward'}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the record."""
        return asdict(self)


def cases(quick: bool) -> list[Case]:
    """Return the cases of a run: T = 512, 2048, 8192 in float32, and with bfloat16 inputs; quick: T = 512 alone."""
    lengths = (512,) if quick else (512, 2048, 8192)
    return [
        Case(T, dtype, backward) for dtype in ("float32", "bfloat16") for backward in (False, True) for T in lengths
    ]


def make_inputs(case: Case, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return q, k, v, log_decay, beta in float32: unit queries and keys, decays logsigmoid(N(0, 1)), beta in (0, 1)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(case.B, case.T, case.H, *shape, generator=generator)

    q, k = (torch.nn.functional.normalize(normal(case.K), dim=-1) for _ in range(2))
    return {
        "q": q,
        "k": k,
        "v": normal(case.V),
        "log_decay": torch.nn.functional.logsigmoid(normal(case.K)),
        "beta": torch.sigmoid(normal()),
    }


def write_inputs(case: Case, folder: Path) -> None:
    """Write the inputs of a case as .npy files, which the peers' environment can read too."""
    generator = torch.Generator().manual_seed(1)
    arrays = {**make_inputs(case), "d_o": torch.randn(case.B, case.T, case.H, case.V, generator=generator)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensor in arrays.items():
        np.save(folder / f"{name}.npy", tensor.numpy())
