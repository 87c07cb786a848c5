"""Our model behind the Auto classes: results and files of the plain one; what cannot be honoured is refused."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'kimi-linear[peers]'")

from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kimi_linear import KimiLinearForCausalLM, load_model, preset
from kimi_linear.base.errors import CheckpointError, ConfigError, ShapeError
from kimi_linear.integrations.transformers import (
    KimiLinearHybridConfig,
    KimiLinearHybridForCausalLM,
    wrap_tokenizer,
)
from kimi_linear.models.kimi_linear.state_dict import to_release
from kimi_linear.text.tokenizer import Tokenizer
from support.awkward import AWKWARD, lively_model
from support.source_tree import SOURCE

HYBRID = preset("tiny-gdn")
IDS = torch.randint(3, 131, (2, 9), generator=torch.Generator().manual_seed(2))


def plain(config: Any = HYBRID) -> KimiLinearForCausalLM:
    return KimiLinearForCausalLM(config, generator=torch.Generator().manual_seed(1)).eval()


def wrapped(model: KimiLinearForCausalLM) -> KimiLinearHybridForCausalLM:
    return KimiLinearHybridForCausalLM(KimiLinearHybridConfig(model.config), model).eval()


def odd() -> KimiLinearHybridForCausalLM:
    return wrapped(lively_model("odd-heads"))


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


# Configuration


@pytest.mark.parametrize("network", [HYBRID, *AWKWARD.values()], ids=["hybrid", *AWKWARD])
def test_a_configuration_survives_its_own_json(network: Any) -> None:
    config = KimiLinearHybridConfig(network, dtype="bfloat16")
    again = KimiLinearHybridConfig.from_dict(json.loads(config.to_json_string()))
    assert again == config
    assert again.dtype == torch.bfloat16
    if network is HYBRID:
        assert again.network == network


def test_configurations_of_different_networks_differ() -> None:
    assert KimiLinearHybridConfig(HYBRID) != KimiLinearHybridConfig(dataclasses.replace(HYBRID, max_length=77))


def test_a_configuration_answers_what_trainers_ask() -> None:
    config = KimiLinearHybridConfig(AWKWARD["odd-heads"])
    sizes = (config.vocab_size, config.hidden_size, config.num_hidden_layers, config.num_attention_heads)
    assert sizes == (131, 80, 4, 5)
    assert (config.eos_token_id, config.pad_token_id, config.use_cache, config.is_encoder_decoder) == (
        2,
        None,
        True,
        False,
    )
    config.pad_token_id = 7
    assert config.network.pad_token_id == 7
    with pytest.raises(AttributeError, match="hidden_size"):
        config.hidden_size = 8  # type: ignore[misc]


def test_a_configuration_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected 'kimi_linear'"):
        KimiLinearHybridConfig(model_type="llama")
    with pytest.raises(ConfigError, match="unknown key 'hiden_size'"):
        KimiLinearHybridConfig(**{**KimiLinearHybridConfig(HYBRID).to_dict(), "hiden_size": 3})
    with pytest.raises(ConfigError, match="were both given"):
        KimiLinearHybridConfig(HYBRID, vocab_size=3)


# Files


def test_a_checkpoint_of_our_own_type_loads_through_the_auto_classes(tmp_path: Path) -> None:
    model = plain()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is KimiLinearHybridForCausalLM
    assert type(AutoConfig.from_pretrained(tmp_path)) is KimiLinearHybridConfig
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert AutoModelForCausalLM.from_config(loaded.config).config == loaded.config


@pytest.mark.parametrize("name", ["two-dense", "first-mla"])
def test_saved_files_are_those_of_the_plain_model(name: str, tmp_path: Path) -> None:
    """Tied embeddings in one, bfloat16 in the other, and the released type in both."""
    model = lively_model(name)
    model.save_pretrained(tmp_path / "plain")
    loaded = KimiLinearHybridForCausalLM.from_pretrained(tmp_path / "plain")
    loaded.save_pretrained(tmp_path / "again", max_shard_size="50KB")
    loaded.save_pretrained(tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    files = {file.name for file in (tmp_path / "again").iterdir()}
    assert files == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text())["eos_token_id"] == [2]


def test_shards_and_a_given_state_are_saved(tmp_path: Path) -> None:
    model = odd()
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert load_model(tmp_path).model.embed_tokens.weight.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "not-here", is_main_process=False)
    assert not (tmp_path / "not-here").exists()


def test_saving_beside_other_things_replaces_only_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "README.md").write_text("notes")
    model = odd()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    model.save_pretrained(tmp_path)
    names = {"README.md", "checkpoint-5", "config.json", "generation_config.json", "model.safetensors"}
    assert {entry.name for entry in tmp_path.iterdir()} == names
    assert torch.equal(load_model(tmp_path)(IDS).logits, model(IDS).logits)


def test_generation_settings_survive(tmp_path: Path) -> None:
    model = odd()
    model.generation_config.max_new_tokens = 3
    model.generation_config.eos_token_id = [2, 5]
    model.save_pretrained(tmp_path)
    again = KimiLinearHybridForCausalLM.from_pretrained(tmp_path)
    assert again.generation_config.max_new_tokens == 3
    assert again.generation_config.eos_token_id == [2, 5]
    assert load_model(tmp_path).end_token_ids == (2, 5)


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}])
def test_dtype_and_device_map_are_honoured(device_map: Any, tmp_path: Path) -> None:
    plain().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16", device_map=device_map)
    assert (loaded.dtype, loaded.config.dtype) == (torch.bfloat16, torch.bfloat16)
    expected = torch.accelerator.current_accelerator() if device_map == "auto" else None
    assert loaded.device == (expected or torch.device("cpu"))
    assert loaded.model.layers[0].self_attn.A_log.dtype == torch.float32
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.float32


@pytest.mark.parametrize(
    "arguments",
    [
        {"attn_implementation": "flash_attention_2"},
        {"quantization_config": {"bits": 4}},
        {"device_map": {"model": "cpu", "lm_head": "cpu"}},
        {"device_map": "balanced"},
        {"revision": "other"},
        {"variant": "fp16"},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_loading_refuses_what_it_cannot_honour(arguments: dict[str, Any], tmp_path: Path) -> None:
    plain().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        KimiLinearHybridForCausalLM.from_pretrained(tmp_path, **arguments)


def test_saving_refuses_what_it_cannot_honour(tmp_path: Path) -> None:
    for name, value in {"push_to_hub": True, "variant": "fp16", "safe_serialization": False}.items():
        with pytest.raises(ConfigError, match=name):
            odd().save_pretrained(tmp_path / "x", **{name: value})
    assert not (tmp_path / "x").exists()


def test_a_configuration_of_another_network_is_refused(tmp_path: Path) -> None:
    plain().save_pretrained(tmp_path)
    other = KimiLinearHybridConfig(dataclasses.replace(HYBRID, norm_eps=0.5))
    with pytest.raises(ConfigError, match="another network"):
        KimiLinearHybridForCausalLM.from_pretrained(tmp_path, config=other)
    with pytest.raises(CheckpointError, match="does not exist"):
        KimiLinearHybridForCausalLM.from_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["odd-heads", "two-dense"])
def test_a_state_of_either_layout_is_loaded(name: str) -> None:
    """A Trainer that resumes reads a checkpoint's file, in shards or whole, straight into load_state_dict."""
    model = wrapped(lively_model(name))
    network = model.config.network
    own = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    release = to_release({key: tensor for key, tensor in own.items() if key in network.shapes()}, network)
    fresh = KimiLinearHybridForCausalLM(KimiLinearHybridConfig(network))
    fresh.load_state_dict(release)
    assert all(torch.equal(tensor, own[key]) for key, tensor in fresh.state_dict().items())
    fresh = KimiLinearHybridForCausalLM(KimiLinearHybridConfig(network))
    for parity in (0, 1):
        shard = {key: tensor for index, (key, tensor) in enumerate(release.items()) if index % 2 == parity}
        assert fresh.load_state_dict(shard, strict=False).unexpected_keys == []
    assert all(torch.equal(tensor, own[key]) for key, tensor in fresh.state_dict().items())
    fresh = KimiLinearHybridForCausalLM(KimiLinearHybridConfig(network))
    fresh.load_state_dict(own)
    assert all(torch.equal(tensor, own[key]) for key, tensor in fresh.state_dict().items())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        fresh.load_state_dict({**release, "other": torch.zeros(1)})


def test_the_tokenizer_of_our_own_type_knows_its_special_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["to be or not to be"], vocab_size=270)
    config = dataclasses.replace(HYBRID, vocab_size=270, eos_token_id=tokenizer.eos_id)
    plain(config).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.eos_token, loaded.eos_token_id) == (tokenizer.eos, tokenizer.eos_id)
    assert loaded("not to be").input_ids == tokenizer.encode("not to be")
    loaded.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert "KimiLinear" not in saved["tokenizer_class"]
    assert wrap_tokenizer(tokenizer)("not to be").input_ids == tokenizer.encode("not to be")


def run(code: str, *arguments: object) -> str:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_released_type_is_ours_only_on_request(tmp_path: Path) -> None:
    odd().save_pretrained(tmp_path)
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
import kimi_linear.integrations.transformers as ours
ours.register()
theirs = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ours.register(native=True)
mine = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(theirs).__module__.split(".")[0], type(mine).__module__.split(".")[0])
ids = torch.arange(3, 12)[None]
with torch.no_grad():
    print(torch.allclose(theirs(ids).logits, mine(ids).logits, rtol=1e-3, atol=1e-3))
mine.save_pretrained(sys.argv[1] + "/again")
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/again").config).__name__)
"""
    assert run(code, tmp_path).split() == ["transformers", "kimi_linear", "True", "KimiLinearReleaseConfig"]


# Forward


@pytest.mark.parametrize("name", ["odd-heads", "two-dense"])
def test_loss_and_gradients_are_those_of_the_plain_model(name: str) -> None:
    model = lively_model(name)
    labels = IDS.clone()
    labels[0, 3:6] = -100
    model(IDS, labels=labels).loss.backward()
    expected = gradients(model)
    model = wrapped(model).train()
    output = model(IDS, labels=labels)
    assert output.logits is None
    output.loss.backward()
    found = gradients(model)
    assert found.keys() >= expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, msg=key)


def test_logits_come_beside_the_loss_where_they_are_read() -> None:
    model = odd()
    with torch.no_grad():
        logits = model(IDS).logits
        assert torch.equal(model(IDS, labels=IDS).logits, logits)
        assert torch.equal(model.train()(IDS, labels=IDS, logits_to_keep=0).logits, logits)
        assert torch.equal(model(IDS, logits_to_keep=2).logits, logits[:, -2:])
        assert torch.equal(model(IDS, logits_to_keep=torch.tensor([1, 4])).logits, logits[:, [1, 4]])


def test_the_loss_of_accumulated_batches_is_the_loss_of_one() -> None:
    model = odd()
    labels = IDS.clone()
    labels[1, 2:8] = -100
    whole = model(IDS, labels=labels).loss
    items = (labels[:, 1:] != -100).sum()
    parts = [model(IDS[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=items).loss for i in (0, 1)]
    torch.testing.assert_close(parts[0] + parts[1], whole)
    torch.testing.assert_close(model(IDS, labels=labels, num_items_in_batch=int(items)).loss, whole)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_neither_logits_nor_loss(side: str) -> None:
    model, row = odd(), IDS[:1]
    pad = torch.zeros(1, 4, dtype=torch.long)
    halves = [pad, row] if side == "left" else [row, pad]
    ids = torch.cat([torch.cat(halves, dim=1), torch.randint(3, 131, (1, 13))])
    mask = torch.cat(
        [torch.cat([torch.ones_like(h) if h is row else h for h in halves], dim=1), torch.ones_like(ids[:1])]
    )
    real = slice(4, None) if side == "left" else slice(None, 9)
    output = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    torch.testing.assert_close(output.logits[0, real], model(row).logits[0], rtol=1e-4, atol=1e-4)
    sums = [model(x, labels=x, num_items_in_batch=1).loss for x in (row, ids[1:])]
    torch.testing.assert_close(output.loss, (sums[0] + sums[1]) / (8 + 12))


def test_packed_sequences_are_the_sequences_one_by_one() -> None:
    model = odd()
    first, second = IDS[:1, :4], IDS[1:, :7]
    ids = torch.cat([first, second], dim=1)
    expected = torch.cat([model(first).logits, model(second).logits], dim=1)
    loss = sum(model(x, labels=x, num_items_in_batch=9).loss for x in (first, second))
    positions = torch.cat([torch.arange(4), torch.arange(7)])[None]
    offsets = torch.tensor([0, 4, 11], dtype=torch.int32)
    for packing in ({"position_ids": positions}, {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}):
        output = model(ids, labels=ids, **packing)
        torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(output.loss, loss)
    with pytest.raises(ConfigError, match="unknown argument 'cu_seqlens'"):
        model(ids, cu_seqlens=offsets)
    with pytest.raises(ShapeError, match="start over inside 2 rows"):
        model(ids.expand(2, -1), position_ids=positions.expand(2, -1))


def test_embeddings_may_take_the_place_of_tokens() -> None:
    model = odd()
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(IDS)).logits, model(IDS).logits)
    with pytest.raises(ConfigError, match="one of input_ids and inputs_embeds"):
        model()


def test_hidden_states_run_from_the_embedding_to_the_norm() -> None:
    model = odd()
    states = model(IDS, output_hidden_states=True).hidden_states
    assert len(states) == 5
    assert torch.equal(states[0], model.get_input_embeddings()(IDS))
    assert torch.equal(model.lm_head(states[-1]), model(IDS).logits)
    with pytest.raises(ConfigError, match="output_attentions"):
        model(IDS, output_attentions=True)


@pytest.mark.parametrize("every", [1, 2])
def test_gradient_checkpointing_changes_no_gradient(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = odd().train()
    model(IDS, labels=IDS).loss.backward()
    expected = gradients(model)
    model.activation_checkpointing_enable(every_n_layers=every)
    calls = []
    inner = model.model.checkpoint_function
    assert inner is not None
    monkeypatch.setattr(model.model, "checkpoint_function", lambda *a: calls.append(a) or inner(*a))
    assert model.is_activation_checkpointing
    model(IDS, labels=IDS).loss.backward()
    found = gradients(model)
    assert len(calls) == 4 // every
    assert all(torch.equal(found[key], gradient) for key, gradient in expected.items())
    model.activation_checkpointing_disable()
    model(IDS, labels=IDS).loss.backward()
    assert len(calls) == 4 // every
    assert not model.is_activation_checkpointing


def test_a_cache_is_kept_only_where_no_gradient_is() -> None:
    model = odd()
    assert model(IDS).past_key_values is None
    with torch.no_grad():
        assert model(IDS).past_key_values.get_seq_length() == 9
        assert model(IDS, use_cache=False).past_key_values is None


def test_fresh_weights_are_those_of_the_plain_model() -> None:
    torch.manual_seed(4)
    expected = KimiLinearForCausalLM(HYBRID).state_dict()
    torch.manual_seed(4)
    found = KimiLinearHybridForCausalLM(KimiLinearHybridConfig(HYBRID)).state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
