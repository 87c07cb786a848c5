"""The inverse of a chunk's unit lower triangle: near float32, for merges in tf32 would lose three digits."""

import pytest
import torch
from torch import Tensor

from support import ops
from support.ops import DEVICE

pytestmark = ops.TRITON


def lower_triangle(C: int, strength: float, correlation: float) -> Tensor:
    """Return strength times the products of unit keys with earlier ones, whose cosines are about `correlation`."""
    generator = torch.Generator().manual_seed(0)
    common, own = (torch.randn(n, 128, generator=generator, dtype=torch.float64) for n in (1, C))
    keys = torch.nn.functional.normalize(correlation**0.5 * common + (1 - correlation) ** 0.5 * own, dim=1)
    return (strength * keys @ keys.T).tril(-1)


@pytest.mark.parametrize("C", [16, 32, 64])
@pytest.mark.parametrize(("strength", "correlation"), [(1.0, 0.0), (2.0, 0.9), (2.0, 1.0)])
def test_the_inverse_is_near_float32_for_strengths_up_to_two(C, strength, correlation) -> None:
    from support.triton_kernels import inverse_kernel

    lower = lower_triangle(C, strength, correlation)
    expected = torch.linalg.inv(torch.eye(C, dtype=torch.float64) + lower)
    found = torch.full((C, C), float("nan"), device=DEVICE)
    inverse_kernel[(1,)](lower.float().to(DEVICE), found, C=C)
    error = ((found.cpu().double() - expected).norm() / expected.norm()).item()
    # The merges in tf32 would be off by 1e-3 and more; float32 rounding of the input alone gives 1e-6.
    assert error < 2e-5


def test_the_test_sees_merges_in_tf32() -> None:
    """Rounding the two halves' inverses to tf32 once, far less than merging in it, does not pass."""
    lower = lower_triangle(64, 2.0, 0.9)
    eye = torch.eye(32, dtype=torch.float64)
    a, d = (torch.linalg.inv(eye + half) for half in (lower[:32, :32], lower[32:, 32:]))
    below = -tf32(d) @ tf32(lower[32:, :32]) @ tf32(a)
    exact = -d @ lower[32:, :32] @ a
    assert ((below - exact).norm() / exact.norm()).item() > 2e-5


def tf32(x: Tensor) -> Tensor:
    """Return x with ten bits after the point."""
    bits = (x.float().view(torch.int32) + 0x1000) & ~0x1FFF
    return bits.view(torch.float32).double()
