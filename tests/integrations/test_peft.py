"""LoRA on our layers: every target changes the output as merging it does, in prefill, decoding and loss, and trains."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'kimi-linear[peers]'")
pytest.importorskip("peft", reason="peft is not installed: pip install 'kimi-linear[peers]'")

import peft
from torch import nn

from kimi_linear import KimiLinearForCausalLM, load_model
from kimi_linear.base.errors import CheckpointError, ConfigError
from kimi_linear.integrations.transformers import KimiLinearHybridConfig, KimiLinearHybridForCausalLM
from kimi_linear.ops import native
from support.awkward import lively_model

KDA = ["q_proj", "k_proj", "v_proj", "f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj", "b_proj", "o_proj"]
MLA = ["kv_a_proj_with_mqa", "kv_b_proj"]
DENSE = ["gate_proj", "up_proj", "down_proj"]
EXPERTS = ["experts.w1", "experts.w2", "experts.w3", "gate.weight"]
TARGETS = [*KDA, *MLA, *DENSE, "lm_head", *EXPERTS]
IDS = torch.randint(3, 131, (2, 9), generator=torch.Generator().manual_seed(2))
# PEFT asks transformers under a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
needs_kernels = pytest.mark.skipif(native.why_unavailable() is not None, reason="there are no native kernels")


def lora(*targets: str, **options: Any) -> Any:
    parameters = [name for name in targets if name in EXPERTS]
    modules = [name for name in targets if name not in EXPERTS]
    return peft.LoraConfig(r=4, target_modules=modules, target_parameters=parameters, **options)


def wrapped() -> KimiLinearHybridForCausalLM:
    plain = lively_model("odd-heads")
    return KimiLinearHybridForCausalLM(KimiLinearHybridConfig(plain.config), plain).eval()


def enliven(model: nn.Module) -> None:
    """Draw the matrices of all adapters; as PEFT leaves them they change nothing yet."""
    draw = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw))


def adapted(*targets: str, **options: Any) -> Any:
    model = peft.get_peft_model(wrapped(), lora(*targets, **options))
    enliven(model)
    return model.eval()


def outputs(model: Any) -> list[torch.Tensor]:
    """Return the logits of a prompt, those of three tokens behind it one by one, and the loss in training."""
    with torch.no_grad():
        first = model(IDS[:, :6])
        steps = [model(IDS[:, t : t + 1], past_key_values=first.past_key_values).logits for t in range(6, 9)]
        loss = model.train()(input_ids=IDS, labels=IDS).loss
    model.eval()
    return [first.logits, torch.cat(steps, dim=1), loss]


@pytest.mark.parametrize("target", TARGETS)
def test_an_adapter_does_what_merging_it_does(target: str) -> None:
    base = outputs(wrapped())
    model = adapted(target)
    found = outputs(model)
    merged = outputs(model.merge_and_unload())
    for before, with_adapter, expected in zip(base, found, merged, strict=True):
        assert not torch.allclose(with_adapter, before, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(with_adapter, expected, rtol=1e-4, atol=1e-4)


def test_disabled_adapters_change_nothing() -> None:
    model = adapted(*TARGETS)
    with model.disable_adapter():
        found = outputs(model)
    for before, disabled in zip(outputs(wrapped()), found, strict=True):
        torch.testing.assert_close(disabled, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_training_reaches_every_target_and_reduces_the_loss(recompute: bool) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(wrapped(), lora(*TARGETS)).train()
    if recompute:
        model.base_model.model.activation_checkpointing_enable()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trained)
    optimiser = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    untouched = [name for name, parameter in trained.items() if parameter.grad is None or not parameter.grad.any()]
    assert untouched == []
    assert losses[-1] < 0.6 * losses[0]


def test_all_linear_reaches_the_linear_layers_below_the_head() -> None:
    model = peft.get_peft_model(wrapped(), peft.LoraConfig(r=2, target_modules="all-linear"))
    assert set(model.peft_config["default"].target_modules) == {*KDA, *MLA, *DENSE}


def test_generation_with_adapters_is_generation_with_merged_weights() -> None:
    model = adapted(*TARGETS)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    found = model.generate(input_ids=IDS, **options)
    assert torch.equal(found, model.merge_and_unload().generate(IDS, **options))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_a_saved_adapter_and_a_saved_merged_model_are_the_same(tmp_path: Path) -> None:
    model = adapted(*TARGETS)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(wrapped(), tmp_path / "adapter")
    torch.testing.assert_close(again(IDS).logits, expected)
    with pytest.raises(CheckpointError, match="without wrappers or adapters"):
        model.base_model.model.save_pretrained(tmp_path / "model")
    model.merge_and_unload().save_pretrained(tmp_path / "model")
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "model")(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_layers_that_are_trained_whole_take_part() -> None:
    """Convolutions and norms have no LoRA; PEFT trains copies of them, in prefill and decoding."""
    model = peft.get_peft_model(wrapped(), lora("q_proj", modules_to_save=["k_conv1d", "o_norm"])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(0.5)
    found, base = outputs(model), outputs(wrapped())
    merged = outputs(model.merge_and_unload())
    for before, with_copies, expected in zip(base, found, merged, strict=True):
        assert not torch.allclose(with_copies, before, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(with_copies, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Unsupported layer type.*RMSNorm:UserWarning")
def test_trained_norms_take_part() -> None:
    model = peft.get_peft_model(wrapped(), peft.LNTuningConfig(target_modules=["o_norm"])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_tuning" in name:
                parameter.mul_(0.5)
    for before, found in zip(outputs(wrapped()), outputs(model), strict=True):
        assert not torch.allclose(found, before, rtol=1e-3, atol=1e-3)


# The plain model, without transformers


def plain_with_adapters(*targets: str) -> KimiLinearForCausalLM:
    model = peft.inject_adapter_in_model(lora(*targets), lively_model("odd-heads"))
    enliven(model)
    return model.eval()


@pytest.mark.parametrize("target", ["kv_b_proj", "lm_head"])
def test_the_plain_model_takes_adapters_too(target: str) -> None:
    base, model = lively_model("odd-heads"), plain_with_adapters(target)
    adapted_model = adapted(target)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, adapted_model(IDS).logits)
        loss = model(IDS, labels=IDS).loss
        torch.testing.assert_close(loss, adapted_model(input_ids=IDS, labels=IDS).loss)
        assert abs(loss - base(IDS, labels=IDS).loss) > 1e-2


@needs_kernels
def test_a_model_with_adapters_is_not_prepared_for_inference() -> None:
    with pytest.raises(ConfigError, match="as adapters do; merge them into the weights"):
        plain_with_adapters("q_proj").prepare_for_inference("float32")


@needs_kernels
@pytest.mark.parametrize("target", ["q_proj", "experts.w1"])
def test_a_prepared_model_sees_adapters_that_come_later(target: str) -> None:
    expected = plain_with_adapters(target)
    model = lively_model("odd-heads").prepare_for_inference("float32")
    with torch.no_grad():
        model(IDS)
        peft.inject_adapter_in_model(lora(target), model)
        enliven(model)
        torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-4)
        caches = [m.new_cache(2) for m in (model, expected)]
        for t in range(9):
            step = IDS[:, t : t + 1]
            steps = [model(step, cache=caches[0]).logits, expected(step, cache=caches[1]).logits]
        torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-4)


def test_a_copy_of_an_adapted_model_is_its_equal() -> None:
    model = adapted("kv_b_proj")
    assert torch.equal(copy.deepcopy(model)(IDS).logits, model(IDS).logits)
