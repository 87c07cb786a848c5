"""Named cases that tests and benchmarks share. Letters as in api.py."""

import itertools
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class ConvSpec:
    """One call of `short_conv`; `lengths` packs sequences and takes the place of T."""

    name: str
    T: int = 11
    B: int = 1
    D: int = 6
    W: int = 4
    lengths: tuple[int, ...] | None = None
    initial_state: bool = True
    activation: str | None = "silu"

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Return the keyword arguments of `short_conv`, the same values for every dtype up to rounding."""
        generator = torch.Generator().manual_seed(seed)
        tokens, sequences = (self.T, self.B) if self.lengths is None else (sum(self.lengths), len(self.lengths))
        shapes = [(self.B, tokens, self.D), (self.D, self.W), (sequences, self.D, self.W - 1)]
        x, weight, state = (
            torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes
        )
        offsets = None if self.lengths is None else [0, *itertools.accumulate(self.lengths)]
        return {
            "x": x,
            "weight": weight,
            "initial_state": state if self.initial_state else None,
            "cu_seqlens": None if offsets is None else torch.tensor(offsets, dtype=torch.int32, device=device),
            "activation": self.activation,
        }


SPECS = (
    *(ConvSpec(f"T{T}", T=T) for T in (0, 1, 2, 3, 4, 17, 64, 97)),
    ConvSpec("batch", B=3, T=19),
    ConvSpec("no_state", B=2, T=7, initial_state=False),
    ConvSpec("no_state_shorter_than_history", T=2, initial_state=False),
    ConvSpec("linear", activation=None),
    ConvSpec("one_tap", W=1),
    ConvSpec("two_taps", W=2),
    ConvSpec("many_taps", W=7, T=5),
    ConvSpec("one_channel", D=1),
    ConvSpec("many_channels", B=2, T=70, D=67),
    ConvSpec("many_channels_and_taps", T=40, D=67, W=6),
    ConvSpec("packed_many_channels", lengths=(70, 0, 3, 1, 33), D=67),
    ConvSpec("packed_one", lengths=(9,)),
    ConvSpec("packed_ragged", lengths=(5, 1, 17, 2, 3, 31)),
    ConvSpec("packed_empty_first", lengths=(0, 4, 9)),
    ConvSpec("packed_empty_middle", lengths=(6, 0, 0, 5)),
    ConvSpec("packed_empty_last", lengths=(2, 7, 0)),
    ConvSpec("packed_empty_all", lengths=(0, 0, 0)),
    ConvSpec("packed_ones", lengths=(1,) * 23),
    ConvSpec("packed_no_state", lengths=(1, 0, 8, 2), initial_state=False),
    ConvSpec("packed_one_tap", lengths=(3, 0, 2), W=1),
)

# One stream of the released model's convolution, for benchmarks alone.
BENCHMARK_SPECS = (
    ConvSpec("prefill_4k", T=4096, D=4096, initial_state=False),
    ConvSpec("documents_4k", D=4096, lengths=(512,) * 8, initial_state=False),
)
