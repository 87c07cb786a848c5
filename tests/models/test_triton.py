"""The whole model on the Triton kernels: every operator that has one, in training and in decoding."""

import dataclasses

import pytest
import torch

from kimi_linear.base import env
from kimi_linear.base.numerics import relative_error, tolerance
from kimi_linear.models.kimi_linear.model import KimiLinearLM
from kimi_linear.models.kimi_linear.presets import preset
from support import ops

pytestmark = [
    ops.TRITON,
    # As in tests/ops/delta_rule/test_triton.py.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]
LAYERS = ("kda_dense", "mla")
# Operators a KDA layer, latent attention, experts, norms and the head call, which their kernels must have run.
TRAINING = {"kda_core", "short_conv", "gated_rms_norm", "rms_norm", "swiglu", "grouped_mlp", "linear_cross_entropy"}
DECODING = {"kda_layer_decode", "mla_decode", "rms_norm", "swiglu", "grouped_mlp"}


def build() -> KimiLinearLM:
    config = preset("tiny")
    config = dataclasses.replace(config, blocks={name: config.blocks[name] for name in LAYERS}, layers=LAYERS)
    return KimiLinearLM(config, generator=torch.Generator().manual_seed(0)).to(ops.DEVICE)


def tokens(length: int) -> torch.Tensor:
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(1)).to(ops.DEVICE)


def ran(profile: torch.profiler.profile) -> set[str]:
    names = {event.key.removeprefix("kimi_linear::") for event in profile.events()}
    return {name[: name.index("_triton")] for name in names if "_triton" in name}


def with_triton(call):
    with env.changed("KIMI_LINEAR_BACKEND", "triton"), torch.profiler.profile() as profile:
        found = call()
    return found, ran(profile)


def test_a_training_step_equals_the_other_backends() -> None:
    model, ids = build(), tokens(5)

    def step() -> list[torch.Tensor]:
        loss = model(ids, labels=ids).loss
        return [loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]

    expected = step()
    found, names = with_triton(step)
    limits = tolerance(torch.float32)
    assert relative_error(found[0], expected[0]) <= limits.output
    errors = [relative_error(x, y) for x, y in zip(found[1:], expected[1:], strict=True) if y.abs().sum() > 0]
    assert max(errors) <= limits.gate_gradient
    assert names >= TRAINING


def test_cached_tokens_equal_the_other_backends() -> None:
    model, ids = build(), tokens(6)

    @torch.inference_mode()
    def steps() -> torch.Tensor:
        cache = model.new_cache(1)
        parts = [model(part, cache=cache).logits for part in ids.split([3, 1, 1, 1], dim=1)]
        return torch.cat(parts, dim=1)

    expected = steps()
    found, names = with_triton(steps)
    assert relative_error(found, expected) <= tolerance(torch.float32).output
    assert names >= DECODING
