"""Decay parameters and the router's bias stay in float32, and routing is computed in it."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from kimi_linear.nn.ffn import MoEConfig
from kimi_linear.nn.ffn.moe import MixtureOfExperts, Router
from kimi_linear.nn.mixers import MIXERS, GDNConfig, KDAConfig

SENSITIVE = ("A_log", "dt_bias", "e_score_correction_bias")


def network() -> nn.Module:
    torch.manual_seed(0)
    kda = MIXERS.build(KDAConfig(num_heads=2, head_dim=8), 16)
    gdn = MIXERS.build(GDNConfig(num_heads=2, head_dim=8), 16)
    moe = MixtureOfExperts(MoEConfig(num_experts=4, top_k=2, intermediate_size=8), 16)
    nn.init.normal_(moe.gate.e_score_correction_bias)
    return nn.ModuleDict({"kda": kda, "gdn": gdn, "moe": moe})


def sensitive(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in module.named_parameters() if name.endswith(SENSITIVE)}


@pytest.mark.parametrize(
    "narrow",
    [
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.bfloat16().float(),
    ],
    ids=["bfloat16", "half", "to dtype", "to device and dtype", "there and back"],
)
def test_sensitive_parameters_keep_every_bit(narrow: Callable[[nn.Module], nn.Module]) -> None:
    module = network()
    before = {name: p.clone() for name, p in sensitive(module).items()}
    assert len(before) == 5
    narrow(module)
    for name, parameter in sensitive(module).items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name]), name


def test_all_other_parameters_follow_the_dtype() -> None:
    module = network().bfloat16()
    assert {p.dtype for name, p in module.named_parameters() if not name.endswith(SENSITIVE)} == {torch.bfloat16}


def test_double_widens_everything() -> None:
    assert {p.dtype for p in network().double().parameters()} == {torch.float64}


def test_gradients_of_sensitive_parameters_stay_too() -> None:
    module = network()
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    module.bfloat16()
    grads = {name: p.grad for name, p in sensitive(module).items() if p.grad is not None}
    assert {grad.dtype for grad in grads.values()} == {torch.float32}
    assert len(grads) == 4


def test_moving_to_another_device_moves_sensitive_parameters() -> None:
    assert {p.device.type for p in network().to("meta", torch.bfloat16).parameters()} == {"meta"}


def test_a_module_made_under_a_narrow_default_dtype_has_float32_parameters() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        module = network()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in sensitive(module).values()} == {torch.float32}


@pytest.mark.parametrize("assign", [False, True])
def test_loading_narrow_tensors_leaves_float32_parameters(assign: bool) -> None:
    state = {name: tensor.bfloat16() for name, tensor in network().state_dict().items()}
    module = network().bfloat16()
    module.load_state_dict(state, assign=assign)
    assert {p.dtype for p in sensitive(module).values()} == {torch.float32}
    assert torch.equal(module["kda"].A_log, state["kda.A_log"].float())
    # The caller's tensors are not changed.
    assert {t.dtype for t in state.values()} == {torch.bfloat16}


def test_routing_is_float32_in_a_bfloat16_model_and_under_autocast() -> None:
    torch.manual_seed(0)
    router = Router(MoEConfig(num_experts=64, top_k=8, intermediate_size=8), 32)
    router.reset_own(std=1.0)
    router.bfloat16()
    x = torch.randn(50, 32).bfloat16()
    exact = torch.nn.functional.linear(x.double(), router.weight.double()).sigmoid()
    weights, experts = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast_weights, cast_experts = router(x.float())
    expected, chosen = exact.topk(8)
    assert weights.dtype == cast_weights.dtype == torch.float32
    assert torch.equal(experts.sort().values, chosen.sort().values)
    assert torch.equal(experts, cast_experts)
    expected = exact.gather(1, experts)
    expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cast_weights, weights, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["kda", "gdn", "moe"])
def test_autocast_leaves_sensitive_parameters_and_their_gradients_in_float32(kind: str) -> None:
    layer = network()[kind]
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(1, 6, 16))
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is None or parameter.grad.dtype == torch.float32
