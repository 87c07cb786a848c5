"""What is measured of the operator: the shapes, the inputs, and how many operations a call counts for.

B batch, T tokens, H heads, K key dim, V value dim, as everywhere; a token-head is one token of one head.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

INPUTS = ("q", "k", "v", "log_decay", "beta")
# What a time is divided by: the recurrence token by token, an add and a multiply counting two. Forward: decay the
# state, read it with the erase key, write, read it with the query: 7 K V. Backward, states recomputed: 20 K V.
FORWARD_FLOP = 7
BACKWARD_FLOP = 20
DTYPES = ("float32", "bfloat16")


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


def main_cases(quick: bool) -> list[Case]:
    """Return the cases that other implementations are measured beside; quick: T = 512 alone."""
    lengths = (512,) if quick else (512, 4096)
    return [Case(T, dtype, backward) for dtype in DTYPES for backward in (False, True) for T in lengths]


def sweep_cases(quick: bool) -> list[Case]:
    """Return the further cases over lengths, heads and batches, which are ours alone."""
    if quick:
        return [Case(2048, "float32", backward=False)]
    shapes = [(1, T, 8) for T in (64, 32768)] + [(1, 4096, 1), (1, 4096, 32), (8, 512, 8), (32, 128, 8)]
    return [Case(T, dtype, backward, B, H) for dtype in DTYPES for backward in (False, True) for B, T, H in shapes]


def make_inputs(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """Return q, k, v, log_decay, beta in float32: unit queries and keys, decays logsigmoid(N(0, 1)), beta in (0, 1)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(case.B, case.T, case.H, *shape, generator=generator)

    q, k = (torch.nn.functional.normalize(normal(case.K), dim=-1) for _ in range(2))
    return {
        "q": q,
        "k": k,
        "v": normal(case.V),
        "log_decay": torch.nn.functional.logsigmoid(normal(case.K)),
        "beta": torch.sigmoid(normal()),
    }


def cast_inputs(case: Case, *, requires_grad: bool | None = None) -> list[Tensor]:
    """Return the inputs in the case's dtype, decays in float32, with gradients where the case takes them."""
    dtype, grad = getattr(torch, case.dtype), case.backward if requires_grad is None else requires_grad
    made = make_inputs(case).items()
    return [(x if name == "log_decay" else x.to(dtype)).detach().requires_grad_(grad) for name, x in made]
