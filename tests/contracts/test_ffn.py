"""The contract of every registered feed-forward network."""

import pytest
import torch
from torch import Tensor

from kimi_linear.base.numerics import relative_error, tolerance
from kimi_linear.nn.ffn import FFNS, FFNConfig
from kimi_linear.nn.ffn.base import FFN
from support.flops import measured_flops
from support.parts import FFN_CASES, HIDDEN, without_examples

ffns = pytest.mark.parametrize("config", FFN_CASES.values(), ids=FFN_CASES.keys())


def build(config: FFNConfig, dtype: torch.dtype = torch.float64) -> FFN:
    torch.manual_seed(0)
    return FFNS.build(config, HIDDEN).to(dtype)


def inputs(*lead: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*lead, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_every_registered_part_has_examples() -> None:
    assert without_examples() == set()


@ffns
@torch.no_grad()
def test_a_token_depends_on_itself_only(config: FFNConfig) -> None:
    layer, x = build(config), inputs(2, 9)
    y = layer(x)
    single = torch.stack([layer(x[b, t]) for b in range(2) for t in range(9)]).view_as(y)
    assert relative_error(single, y) <= tolerance(torch.float64).output


@ffns
@pytest.mark.parametrize("lead", [(), (1,), (3, 2), (0,), (2, 0), (2, 3, 4)], ids=str)
def test_any_leading_axes_keep_their_shape(config: FFNConfig, lead: tuple[int, ...]) -> None:
    x = inputs(*lead).requires_grad_()
    y = build(config)(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


@ffns
def test_predicted_parameters_equal_the_built_ones(config: FFNConfig) -> None:
    layer = build(config)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == config.shapes(HIDDEN)
    assert sum(p.numel() for p in layer.parameters()) == config.parameters(HIDDEN)


@ffns
def test_predicted_flops_equal_the_measured(config: FFNConfig) -> None:
    layer, x = build(config, torch.float32), inputs(7, dtype=torch.float32)
    assert measured_flops(lambda: layer(x)) == 7 * config.flops_per_token(HIDDEN, context=1)


@ffns
def test_a_feed_forward_network_remembers_nothing(config: FFNConfig) -> None:
    assert config.state_bytes(1000, 4) == 0


@ffns
def test_gradients_are_finite_and_reach_every_trained_parameter(config: FFNConfig) -> None:
    layer, x = build(config, torch.float32), inputs(64, dtype=torch.float32).requires_grad_()
    (layer(x) * inputs(64, dtype=torch.float32, seed=2)).sum().backward()
    trained = [(name, p) for name, p in layer.named_parameters() if p.requires_grad]
    for name, tensor in [("x", x), *trained]:
        assert tensor.grad is not None, name
        assert bool(tensor.grad.isfinite().all()), name
        assert float(tensor.grad.abs().max()) > 0, name


@ffns
@torch.no_grad()
def test_bfloat16_follows_float64(config: FFNConfig) -> None:
    layer, x = build(config), inputs(33).bfloat16()
    expected = layer.eval()(x.double())
    y = layer.bfloat16()(x)
    assert y.dtype == torch.bfloat16
    # Three matrix products in a row, each within the table's row for one operator.
    assert relative_error(y, expected) <= 3 * tolerance(torch.bfloat16).output
