"""Singular values near one, singular vectors kept, whatever the backend."""

import pytest
import torch

from kimi_linear.base.errors import BackendError, DtypeError, ShapeError
from kimi_linear.ops.orthogonalise import orthogonalise
from support import ops

BACKENDS = ops.backends("orthogonalise")
SHAPES = ((1, 1), (1, 7), (5, 5), (12, 33), (33, 12), (4, 256), (64, 96), (3, 24, 40), (2, 3, 16, 16))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scalar(value: float) -> float:
    """The iteration on one singular value, from its share of the norm."""
    for _ in range(5):
        value = 3.4445 * value - 4.7750 * value**3 + 2.0315 * value**5
    return value


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_applies_the_polynomial_to_singular_values(shape: tuple[int, ...]) -> None:
    x = draw(*shape)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    share = s / s.square().sum(-1, keepdim=True).sqrt()
    wanted = (u * share.apply_(scalar).unsqueeze(-2)) @ vt
    torch.testing.assert_close(orthogonalise(x, backend="reference"), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_agree_with_float64(backend: str, shape: tuple[int, ...]) -> None:
    x = draw(*shape).float()
    wanted = orthogonalise(x.double(), backend="reference")
    found = orthogonalise(x, backend=backend)
    assert found.dtype == torch.float32
    assert found.shape == x.shape
    # bfloat16 rounds X, A and the update by up to 2^-9 each in five steps, and the polynomial's slope (up to 3.4 a
    # step) carries early roundings on.
    limit = 1e-5 if backend == "reference" else 6e-2
    assert (found - wanted).norm() <= limit * wanted.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_scale_does_not_matter_and_zero_stays_zero(backend: str) -> None:
    x = draw(3, 20, 30).float()
    assert torch.equal(orthogonalise(x * 1024, backend=backend), orthogonalise(x, backend=backend))
    x[1] = 0
    found = orthogonalise(x, backend=backend)
    assert torch.equal(found[1], torch.zeros(20, 30))
    assert found.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_matrix_does_not_see_its_neighbours(backend: str) -> None:
    x = draw(5, 24, 48).float()
    together = orthogonalise(x, backend=backend)
    for one, alone in zip(together, x, strict=True):
        assert torch.equal(one, orthogonalise(alone, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_input_stays_as_it_is(backend: str) -> None:
    x = draw(2, 9, 5).float()
    before = x.clone()
    orthogonalise(x, backend=backend)
    assert torch.equal(x, before)


def test_bad_calls_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"expected \[\.\.\., R, C\]"):
        orthogonalise(torch.ones(3))
    with pytest.raises(DtypeError):
        orthogonalise(torch.ones(3, 3, dtype=torch.int32))
    with pytest.raises(BackendError, match="belongs in an optimizer step"):
        orthogonalise(torch.ones(3, 3, requires_grad=True))
