"""The scores inside one chunk against their definition, at every chunk length, with decays no float can hold."""

import pytest
import torch
from torch import Tensor

from kimi_linear.base.numerics import relative_error
from kimi_linear.ops.delta_rule.scores import Terms, channel_scores, scalar_scores, unit_lower_inverse

READS = pytest.mark.parametrize("read", ["post", "pre"])
CHUNKS = pytest.mark.parametrize("C", [1, 2, 4, 8, 16, 32])


def draw(
    C: int, K: int = 5, *, scalar: bool = False, dtype: torch.dtype = torch.float64, gate: str = "medium"
) -> Terms:
    generator = torch.Generator().manual_seed(C)
    q, k, e, z = (torch.randn(3, C, K, generator=generator, dtype=torch.float64) for _ in range(4))
    g = -torch.rand(3, C, 1 if scalar else K, generator=generator, dtype=torch.float64)
    if gate == "separators":
        g[torch.rand(g.shape, generator=generator) < 0.2] = -1000.0
    return Terms(*(x.to(dtype) for x in (q, k, e, z, g)))


def definition(terms: Terms, read: str) -> tuple[Tensor, ...]:
    """Return P, L and the factors, pair by pair: every exponent is a sum of the decays between two rows."""
    q, k, e, g = (x.double() for x in (terms.q, terms.k, terms.e, terms.g))
    g = g.expand_as(q)
    C = q.shape[1]
    P, L = q.new_zeros(3, C, C), q.new_zeros(3, C, C)
    for r in range(C):
        for s in range(r + 1):
            P[:, r, s] = (q[:, r] * k[:, s] * g[:, s + 1 : r + 1].sum(1).exp()).sum(-1)
            if s < r:
                to = r + 1 if read == "post" else r
                L[:, r, s] = (e[:, r] * k[:, s] * g[:, s + 1 : to].sum(1).exp()).sum(-1)
    G = g.cumsum(1)
    before = G if read == "post" else torch.cat([torch.zeros_like(G[:, :1]), G[:, :-1]], 1)
    to_end = torch.stack([g[:, s + 1 :].sum(1) for s in range(C)], 1)
    return P, L, q * G.exp(), e * before.exp(), k * to_end.exp(), G[:, -1].exp()


def computed(terms: Terms, read: str) -> tuple[Tensor, ...]:
    prepare = scalar_scores if terms.g.shape[-1] == 1 else channel_scores
    scores = prepare(terms, read, keep=False)
    P, L = scores.blocks[:, :, 0], scores.blocks[:, :, 1]
    return (
        P,
        L,
        scores.queries[:, :, 0],
        scores.queries[:, :, 1],
        scores.keys,
        scores.total.expand(-1, terms.q.shape[-1]),
    )


@CHUNKS
@READS
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("gate", ["medium", "separators"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 2e-6)], ids=str)
def test_scores_and_factors_are_those_of_the_definition(C, read, scalar, gate, dtype, limit) -> None:
    terms = draw(C, scalar=scalar, dtype=dtype, gate=gate)
    for x, expected in zip(computed(terms, read), definition(terms, read), strict=True):
        assert relative_error(x, expected) < limit


@pytest.mark.parametrize("scalar", [False, True])
def test_a_key_beside_a_separator_keeps_its_decay_to_the_end(scalar) -> None:
    """Its own decay of -1000 is not part of it, and must not be added and taken away again."""
    terms = draw(32, scalar=scalar, dtype=torch.float32)
    terms.g[:, 7] = -1000.0
    prepare = scalar_scores if scalar else channel_scores
    keys = prepare(terms, "post", keep=False).keys[:, 7]
    expected = terms.k[:, 7].double() * terms.g[:, 8:].double().sum(1).exp()
    torch.testing.assert_close(keys.double(), expected, rtol=2e-6, atol=0)


@CHUNKS
@pytest.mark.parametrize("scalar", [False, True])
def test_without_erase_there_is_one_stream_and_no_inverse(C, scalar) -> None:
    terms = draw(C, scalar=scalar)
    with_erase = computed(terms, "post")
    terms.e = None
    scores = (scalar_scores if scalar else channel_scores)(terms, "post", keep=False)
    assert scores.inverse is None
    assert scores.blocks.shape == (3, C, 1, C)
    torch.testing.assert_close(scores.blocks[:, :, 0], with_erase[0])


@CHUNKS
@READS
def test_terms_are_not_changed(C, read) -> None:
    terms = draw(C)
    before = [x.clone() for x in (terms.q, terms.k, terms.e, terms.g)]
    channel_scores(terms, read, keep=True)
    assert all(torch.equal(x, y) for x, y in zip((terms.q, terms.k, terms.e, terms.g), before, strict=True))


def lower(C: int, kind: str, R: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if kind == "identical":
        # Identical keys, strength two, no decay: the inverse of largest norm a contraction gives.
        return torch.full((R, C, C), 2.0).tril(-1)
    k = torch.rand(R, C, 16, generator=generator)
    k = torch.nn.functional.normalize(k if kind == "correlated" else k - 0.5, dim=-1)
    return 2 * (k @ k.transpose(1, 2)).tril(-1)


@CHUNKS
@pytest.mark.parametrize("R", [1, 3])
@pytest.mark.parametrize("kind", ["gaussian", "correlated", "identical"])
def test_inverse_is_as_good_as_float32_allows_and_leaves_its_argument(C, R, kind) -> None:
    L = lower(C, kind, R)
    before = L.clone()
    inverse = unit_lower_inverse(L)
    assert torch.equal(L, before)
    expected = torch.linalg.inv(torch.eye(C, dtype=torch.float64) + L.double())
    assert relative_error(inverse, expected) < 2e-6
    assert torch.equal(inverse.triu(1), torch.zeros_like(inverse))


def test_inverse_takes_a_strided_argument() -> None:
    L = lower(16, "correlated")
    strided = torch.full((3, 16, 2, 16), float("nan"))
    strided[:, :, 1] = L
    assert torch.equal(unit_lower_inverse(strided[:, :, 1]), unit_lower_inverse(L))
