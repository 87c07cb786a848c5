"""Checkpoints in other layouts load to the same tensors, and what is wrong with one is said in its own names."""

import dataclasses
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimi_linear.base.errors import CheckpointError
from kimi_linear.causal_lm import KimiLinearForCausalLM
from kimi_linear.checkpoint.mapped import MappedCheckpoint
from kimi_linear.models.kimi_linear.presets import preset
from kimi_linear.models.kimi_linear.state_dict import to_release
from kimi_linear.nn.ffn import MoEConfig
from kimi_linear.nn.mixers import KDAConfig, MLAConfig

CONV = ("q_conv1d", "k_conv1d", "v_conv1d")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with two dense layers, and the directory it was saved to in the release's layout."""
    tiny = preset("tiny")
    config = dataclasses.replace(tiny, layers=("kda_dense", "kda_dense", "mla", "kda"))
    model = KimiLinearForCausalLM(config, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.dim() == 1:
                tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))))
    directory = tmp_path_factory.mktemp("release")
    model.save_pretrained(directory)
    return model, directory


def is_expert_layer(config, layer):
    return isinstance(config.layer_blocks[layer].ffn, MoEConfig)


def prefixes(config, kind):
    return [f"model.layers.{i}" for i, b in enumerate(config.layer_blocks) if isinstance(b.mixer, kind)]


def experts_of(tensors, layer, name):
    keys = [
        n for n in tensors if re.fullmatch(rf"{re.escape(layer)}\.block_sparse_moe\.experts\.\d+\.{name}\.weight", n)
    ]
    return torch.stack([tensors.pop(n) for n in sorted(keys, key=lambda n: int(n.split(".")[5]))])


def as_transformers_saves(tensors, config):
    return {
        n.replace("0.mlp.", "0.block_sparse_moe.").replace("1.mlp.", "1.block_sparse_moe."): x
        for n, x in tensors.items()
    }


def as_transformers_holds(tensors, config):
    tensors = dict(tensors)
    for layer in (f"model.layers.{i}" for i in range(config.num_layers) if is_expert_layer(config, i)):
        gate, up = experts_of(tensors, layer, "w1"), experts_of(tensors, layer, "w3")
        tensors[f"{layer}.mlp.experts.gate_up_proj"] = torch.cat([gate, up], 1)
        tensors[f"{layer}.mlp.experts.down_proj"] = experts_of(tensors, layer, "w2")
    for layer in prefixes(config, KDAConfig):
        joined = torch.cat([tensors.pop(f"{layer}.self_attn.{name}.weight") for name in CONV])
        tensors[f"{layer}.self_attn.conv1d.weight"] = joined
        for name in ("f_a_proj.weight", "f_b_proj.weight", "dt_bias", "A_log"):
            tensors[f"{layer}.self_attn.forget_gate.{name}"] = tensors.pop(f"{layer}.self_attn.{name}")
    return {n.replace("block_sparse_moe", "mlp"): x for n, x in tensors.items()}


def as_mlx(tensors, config):
    tensors = dict(tensors)
    for layer in (f"model.layers.{i}" for i in range(config.num_layers) if is_expert_layer(config, i)):
        for name, of in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            tensors[f"{layer}.mlp.switch_mlp.{name}_proj.weight"] = experts_of(tensors, layer, of)
        bias = tensors.pop(f"{layer}.block_sparse_moe.gate.e_score_correction_bias")
        tensors[f"{layer}.mlp.e_score_correction_bias"] = bias
    for layer in prefixes(config, KDAConfig):
        for name in CONV:
            weight = tensors.pop(f"{layer}.self_attn.{name}.weight")
            tensors[f"{layer}.self_attn.{name[0]}_conv.conv.weight"] = weight.movedim(1, 2)
    for layer in prefixes(config, MLAConfig):
        mixer = config.layer_blocks[int(layer.split(".")[-1])].mixer
        weight = tensors.pop(f"{layer}.self_attn.kv_b_proj.weight").view(mixer.num_heads, -1, mixer.kv_lora_rank)
        tensors[f"{layer}.self_attn.embed_q.weight"] = weight[:, : mixer.qk_nope_head_dim].transpose(1, 2)
        tensors[f"{layer}.self_attn.unembed_out.weight"] = weight[:, mixer.qk_nope_head_dim :]
    return {n.replace("block_sparse_moe", "mlp"): x for n, x in tensors.items()}


def flattened(tensors, config):
    """Axes of size 1 dropped, as some tools do."""
    return {n: x.flatten() if n.endswith("A_log") else x.squeeze() if "conv1d" in n else x for n, x in tensors.items()}


LAYOUTS = [as_transformers_saves, as_transformers_holds, as_mlx, flattened]


def rewritten(directory, target, change):
    """Copy a saved model with its tensors changed."""
    shutil.copytree(directory, target)
    tensors = load_file(target / "model.safetensors")
    save_file({n: x.contiguous().clone() for n, x in change(tensors).items()}, target / "model.safetensors")
    return target


def assert_loads(model, directory):
    loaded = KimiLinearForCausalLM.from_pretrained(directory)
    others = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(others[name], tensor), name
    mapped = MappedCheckpoint(directory, model.config)
    for name, tensor in to_release(model.state_dict(), model.config).items():
        assert torch.equal(mapped.read(name), tensor), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_every_layout_loads_to_the_same_tensors(saved, tmp_path, layout):
    model, directory = saved
    changed = rewritten(directory, tmp_path / "m", lambda tensors: layout(tensors, model.config))
    names = load_file(changed / "model.safetensors").keys()
    assert layout is flattened or names != load_file(directory / "model.safetensors").keys()
    assert_loads(model, changed)


def test_layouts_may_be_mixed(saved, tmp_path):
    model, directory = saved

    def mixed(tensors):
        others = [as_transformers_holds(tensors, model.config), as_mlx(tensors, model.config), tensors]
        return {n: x for layer, other in enumerate(others) for n, x in other.items() if f"layers.{layer + 1}." in n} | {
            n: x for n, x in tensors.items() if "layers" not in n or "layers.0." in n
        }

    assert_loads(model, rewritten(directory, tmp_path / "m", mixed))


def without(name):
    return lambda tensors: {n: x for n, x in tensors.items() if n != name}


@pytest.mark.parametrize(
    ("layout", "change", "said"),
    [
        (as_transformers_holds, without("model.layers.2.mlp.experts.down_proj"), "8 missing .*experts.0.w2.weight"),
        (as_mlx, without("model.layers.2.self_attn.embed_q.weight"), "1 missing .a part of .*kv_b_proj.weight"),
        (as_mlx, lambda t: {**t, "model.layers.3.mlp.extra": torch.ones(1)}, "1 unexpected .model.layers.3.mlp.extra"),
        (
            as_transformers_holds,
            lambda t: {**t, "model.layers.0.self_attn.conv1d.weight": torch.ones(5, 1, 4)},
            r"1 of another shape .model.layers.0.self_attn.conv1d.weight \[5, 1, 4\] instead of",
        ),
    ],
)
def test_what_is_wrong_is_said_by_name(saved, tmp_path, layout, change, said):
    model, directory = saved
    changed = rewritten(directory, tmp_path / "m", lambda tensors: change(layout(tensors, model.config)))
    with pytest.raises(CheckpointError, match=said):
        KimiLinearForCausalLM.from_pretrained(changed)


def test_experts_stacked_in_two_ways_are_refused(saved, tmp_path):
    """Both explain every expert, so none is missing and none left over."""
    model, directory = saved

    def both(tensors):
        one, other = as_transformers_holds(tensors, model.config), as_mlx(tensors, model.config)
        return one | {n: x for n, x in other.items() if "switch_mlp" in n}

    with pytest.raises(CheckpointError, match="48 stored twice, in different layouts"):
        KimiLinearForCausalLM.from_pretrained(rewritten(directory, tmp_path / "m", both))


def test_a_tensor_given_in_two_layouts_is_refused(saved, tmp_path):
    model, directory = saved
    changed = rewritten(directory, tmp_path / "m", lambda t: {**t, **as_transformers_holds(t, model.config)})
    with pytest.raises(CheckpointError, match="unexpected"):
        KimiLinearForCausalLM.from_pretrained(changed)
