"""The contract that every mixer fills, recurrence and attention alike."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from kimi_linear.base.errors import ShapeError
from kimi_linear.nn.linear import Linear
from kimi_linear.nn.precision import Float32Parameters
from kimi_linear.nn.state import LayerState


class Mixer(Float32Parameters, ABC):
    """Mix tokens causally: output t depends on inputs 1..t of its own sequence and on nothing else.

    A subclass is built from (config, hidden_size) and draws its weights at once; its class-level `FLOAT32` names the
    parameters that are never narrowed.

    Exactness: a whole prompt, the same prompt in any pieces through a state, one token at a time, and packed among
    other sequences give the same outputs up to rounding.
    """

    @abstractmethod
    def forward(self, x: Tensor, state: Any = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mix x and return a tensor of its shape.

        Args:
            x: [B, T, D], or one packed row [1, T, D].
            state: None to start afresh and remember nothing. Else a state of this mixer with one row a sequence: the
                call continues from it and updates it in place, so a state must not be used by two calls at once, and
                after an error it must be thrown away. Gradients do not flow into it.
            cu_seqlens: Offsets [N + 1] of the packed sequences, first 0 and last T; empty sequences are allowed and
                leave their row of the state as it is. Nothing crosses a boundary.

        Raises:
            ShapeError: x is not [B, T, D] of this mixer's width.
            StateError: The state is of another mixer or has another number of rows.
        """

    @abstractmethod
    def new_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> LayerState:
        """Return the state before the first token, for activations of that dtype; safe at any time."""


def num_sequences(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """Return the number of sequences of a call: rows of x, or packed sequences."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def is_decode(x: Tensor, state: Any, cu_seqlens: Tensor | None) -> bool:
    """Whether a call is one new token a row that takes the one-token operators, which record no gradients."""
    return state is not None and cu_seqlens is None and x.shape[1] == 1 and not torch.is_grad_enabled()


def linear(features_in: int, features_out: int) -> nn.Linear:
    """Return a matrix without bias; no mixer here has one."""
    return Linear(features_in, features_out, bias=False)


def check_input(x: Tensor, hidden_size: int, cu_seqlens: Tensor | None) -> None:
    """Raise ShapeError unless x is [B, T, hidden_size], with B == 1 if packed."""
    if x.dim() != 3 or x.shape[-1] != hidden_size:
        raise ShapeError(f"x is {list(x.shape)}, expected [B, T, {hidden_size}].")
    if cu_seqlens is not None and x.shape[0] != 1:
        raise ShapeError(f"x is {list(x.shape)} with cu_seqlens, expected one packed row [1, T, {hidden_size}].")


def positions(x: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Return the position of each token in its own sequence: [T], or [B, T] for a dense batch with pasts.

    Args:
        x: [B, T, D].
        lengths: Tokens each sequence has already seen, or None for none.
        cu_seqlens: Offsets of the packed sequences, or None.
    """
    steps = torch.arange(x.shape[1], device=x.device)
    past = None if lengths is None else lengths.to(x.device)
    if cu_seqlens is None:
        return steps if past is None else past[:, None] + steps
    offsets = cu_seqlens.to(x.device)
    # Offsets that stop short of T are the operators' to refuse, so the index is kept in range here.
    sequence = torch.searchsorted(offsets[1:].contiguous(), steps, right=True).clamp(max=offsets.shape[0] - 2)
    within = steps - offsets[sequence]
    return within if past is None else within + past[sequence]
