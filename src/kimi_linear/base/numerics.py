"""The one table of tolerances, by dtype, and the one measure of error that tests and self-checks use.

Error is RMS(x - reference) / RMS(reference), taken in float64. No torch here: tensors come in through duck typing so
that the base layer stays importable without it.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tolerance:
    """Relative RMS error allowed against the float64 reference."""

    output: float
    gradient: float
    # Decay and write-strength gradients are sums over many cancelling terms.
    gate_gradient: float


TOLERANCES: dict[str, Tolerance] = {
    "float64": Tolerance(output=1e-10, gradient=1e-10, gate_gradient=1e-9),
    "float32": Tolerance(output=1e-5, gradient=2e-5, gate_gradient=1e-4),
    "bfloat16": Tolerance(output=5e-3, gradient=8e-3, gate_gradient=1.5e-2),
    "float16": Tolerance(output=5e-3, gradient=8e-3, gate_gradient=1.5e-2),
}


def tolerance(dtype: Any) -> Tolerance:
    """Return the table's row for a torch dtype or its name."""
    return TOLERANCES[str(dtype).removeprefix("torch.")]


def relative_error(x: Any, reference: Any) -> float:
    """Return RMS(x - reference) / RMS(reference); inf where either holds a NaN or an infinity, 0 for empty tensors."""
    x, reference = x.detach().double(), reference.detach().double()
    if x.shape != reference.shape:
        raise AssertionError(f"shapes differ: {tuple(x.shape)} and {tuple(reference.shape)}")
    if x.numel() == 0:
        return 0.0
    if not (bool(x.isfinite().all()) and bool(reference.isfinite().all())):
        return float("inf")
    difference = float((x - reference).square().mean().sqrt())
    # Below this the reference is zero for every purpose; the ratio would measure nothing.
    return difference / (float(reference.square().mean().sqrt()) + 1e-8)
