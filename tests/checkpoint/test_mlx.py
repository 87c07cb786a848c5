"""Export to mlx-lm's and to the released layout: nothing but the layout changes, and nothing is left half-written."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kimi_linear.base.errors import CheckpointError, ConfigError, DtypeError
from kimi_linear.causal_lm import KimiLinearForCausalLM, load_model
from kimi_linear.checkpoint.mlx import export_mlx
from kimi_linear.checkpoint.relayout import export_release
from kimi_linear.models.kimi_linear.presets import preset
from kimi_linear.models.kimi_linear.release_config import to_release_config
from support.awkward import AWKWARD, lively_model


def weights(directory):
    """Every stored tensor by name."""
    return {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.fixture
def tiny(tmp_path):
    """A saved model in bfloat16."""
    model = KimiLinearForCausalLM(preset("tiny"), generator=torch.Generator().manual_seed(0)).bfloat16()
    model.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.mark.parametrize("name", AWKWARD)
def test_release_to_mlx_to_release_changes_no_byte(tmp_path, name):
    model = lively_model(name)
    model.save_pretrained(tmp_path / "release")
    export_mlx(tmp_path / "release", tmp_path / "mlx")
    export_release(tmp_path / "mlx", tmp_path / "back")
    assert_same_tensors(weights(tmp_path / "back"), weights(tmp_path / "release"))
    loaded = load_model(tmp_path / "mlx")
    assert to_release_config(loaded.config) == to_release_config(model.config)
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    assert weights(tmp_path / "mlx").keys() != weights(tmp_path / "release").keys()


def test_the_mlx_layout_is_mlx_s(tiny, tmp_path):
    export_mlx(tiny, tmp_path / "mlx")
    found, release = weights(tmp_path / "mlx"), weights(tiny)
    up = [release[f"model.layers.1.block_sparse_moe.experts.{e}.w3.weight"] for e in range(8)]
    assert torch.equal(found["model.layers.1.mlp.switch_mlp.up_proj.weight"], torch.stack(up))
    kv_b = release["model.layers.3.self_attn.kv_b_proj.weight"].view(4, 64, 16)
    assert torch.equal(found["model.layers.3.self_attn.embed_q.weight"], kv_b[:, :32].transpose(1, 2))
    assert torch.equal(found["model.layers.3.self_attn.unembed_out.weight"], kv_b[:, 32:])
    conv = release["model.layers.1.self_attn.q_conv1d.weight"]
    assert torch.equal(found["model.layers.1.self_attn.q_conv.conv.weight"], conv.transpose(1, 2))
    assert not any("block_sparse_moe" in name or "kv_b_proj" in name or "conv1d" in name for name in found)
    with safe_open(tmp_path / "mlx" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "mlx"}


def test_other_layouts_become_the_release(tiny, tmp_path):
    """The dense layer under the name that transformers saves, and decays without axes of size 1."""
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    tensors = {
        name.replace("layers.0.mlp.", "layers.0.block_sparse_moe."): t.flatten() if "A_log" in name else t
        for name, t in weights(tiny).items()
    }
    save_file(tensors, other / "model.safetensors")
    export_release(other, tmp_path / "release")
    assert_same_tensors(weights(tmp_path / "release"), weights(tiny))
    assert (tmp_path / "release" / "config.json").read_text() == (tiny / "config.json").read_text()


@pytest.mark.parametrize("export", [export_mlx, export_release])
def test_another_dtype_leaves_decays_and_router_biases_alone(tiny, tmp_path, export):
    export(tiny, tmp_path / "wide", dtype="float32")
    for name, tensor in weights(tmp_path / "wide").items():
        keeps = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.bfloat16 if keeps else torch.float32), name
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    export(tmp_path / "wide", tmp_path / "narrow", dtype=torch.bfloat16)
    narrow = weights(tmp_path / "narrow")
    assert all((t.dtype == torch.float32) == n.endswith(("A_log", "dt_bias")) for n, t in narrow.items())
    assert_same_tensors(load_model(tmp_path / "narrow").state_dict(), load_model(tiny).state_dict())


def test_shards_have_an_index_and_load(tiny, tmp_path):
    export_mlx(tiny, tmp_path / "mlx", max_shard_size="100KB")
    index = json.loads((tmp_path / "mlx" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["weight_map"].keys() == weights(tmp_path / "mlx").keys()
    assert_same_tensors(load_model(tmp_path / "mlx").state_dict(), load_model(tiny).state_dict())


def test_what_lies_beside_the_tensors_comes_along(tiny, tmp_path):
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "notes.txt", "pytorch_model.bin"):
        (tiny / name).write_text(name)
    (tiny / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    export_mlx(tiny, tmp_path / "mlx")
    names = {file.name for file in (tmp_path / "mlx").iterdir()}
    kept = {"tokenizer.json", "chat_template.jinja", "LICENSE", "README.md"}
    assert names == {"config.json", "generation_config.json", "model.safetensors"} | kept
    assert load_model(tmp_path / "mlx").end_token_ids == (5, 7)


def test_an_existing_directory_stays_as_it_is(tiny, tmp_path):
    (tmp_path / "mlx").mkdir()
    with pytest.raises(CheckpointError, match="it exists; give a directory that does not"):
        export_mlx(tiny, tmp_path / "mlx")
    assert list((tmp_path / "mlx").iterdir()) == []


def test_a_damaged_source_leaves_nothing_behind(tiny, tmp_path):
    file = tiny / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        export_mlx(tiny, tmp_path / "mlx")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing_behind(tiny, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kimi_linear.checkpoint.relayout.write_tensors", full)
    with pytest.raises(CheckpointError, match=r"cannot save to .*: No space left on device"):
        export_mlx(tiny, tmp_path / "mlx")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_model_without_experts_comes_back_equal(tmp_path):
    tiny = preset("tiny")
    dense = dataclasses.replace(tiny.blocks["mla"], ffn=tiny.blocks["kda_dense"].ffn)
    blocks = {"kda_dense": tiny.blocks["kda_dense"], "mla_dense": dense}
    config = dataclasses.replace(tiny, blocks=blocks, layers=("kda_dense", "mla_dense"))
    model = KimiLinearForCausalLM(config)
    model.save_pretrained(tmp_path / "dense")
    export_mlx(tmp_path / "dense", tmp_path / "out")
    found = load_model(tmp_path / "out").state_dict()
    assert {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, found[name])} == set()


def test_models_that_mlx_lm_has_no_type_for_are_refused(tmp_path):
    KimiLinearForCausalLM(dataclasses.replace(preset("tiny-mla"))).save_pretrained(tmp_path / "mla")
    with pytest.raises(CheckpointError, match="no layer with Kimi Delta Attention"):
        export_mlx(tmp_path / "mla", tmp_path / "out")
    KimiLinearForCausalLM(preset("tiny-gdn")).save_pretrained(tmp_path / "gdn")
    with pytest.raises(ConfigError, match="kind 'gdn'"):
        export_mlx(tmp_path / "gdn", tmp_path / "out")


def test_an_unknown_dtype_is_refused(tiny, tmp_path):
    with pytest.raises(DtypeError, match="'int3'"):
        export_mlx(tiny, tmp_path / "mlx", dtype="int3")
