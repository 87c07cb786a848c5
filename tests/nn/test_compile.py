"""Layers compile whole: no graph break, forward and backward, dense and packed."""

import pytest
import torch
from torch import Tensor, nn

from kimi_linear.base.numerics import relative_error, tolerance
from kimi_linear.nn.ffn import FFNS, FFNConfig
from kimi_linear.nn.mixers import MIXERS, MixerConfig
from support.parts import FFN_CASES, HIDDEN, MIXER_CASES

TOLERANCE = tolerance(torch.float32)


def compiled(layer: nn.Module) -> nn.Module:
    torch.compiler.reset()
    return torch.compile(layer, fullgraph=True, backend="aot_eager")


def assert_same_training_step(layer: nn.Module, x: Tensor, cu_seqlens: Tensor | None = None) -> None:
    rest = () if cu_seqlens is None else (None, cu_seqlens)
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    results = []
    for run in (layer, compiled(layer)):
        y = run(x, *rest)
        results.append((y, torch.autograd.grad((y * y).sum(), trained, allow_unused=True)))
    (expected, expected_grads), (found, found_grads) = results
    assert relative_error(found, expected) <= TOLERANCE.output
    for one, two in zip(expected_grads, found_grads, strict=True):
        assert (one is None) == (two is None)
        assert one is None or relative_error(two, one) <= TOLERANCE.gate_gradient


@pytest.mark.parametrize("config", MIXER_CASES.values(), ids=MIXER_CASES.keys())
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_a_mixer_compiles_whole(config: MixerConfig, packed: bool) -> None:
    torch.manual_seed(0)
    layer = MIXERS.build(config, HIDDEN)
    x = torch.randn(1 if packed else 2, 11, HIDDEN, requires_grad=True)
    assert_same_training_step(layer, x, torch.tensor([0, 4, 4, 11], dtype=torch.int32) if packed else None)


@pytest.mark.parametrize("config", FFN_CASES.values(), ids=FFN_CASES.keys())
def test_a_feed_forward_network_compiles_whole(config: FFNConfig) -> None:
    torch.manual_seed(0)
    assert_same_training_step(FFNS.build(config, HIDDEN), torch.randn(2, 11, HIDDEN, requires_grad=True))
