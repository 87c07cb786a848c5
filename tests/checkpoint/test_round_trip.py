import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from kimi_linear.causal_lm import KimiLinearForCausalLM, load_model
from kimi_linear.models.kimi_linear.keys import release_bytes, release_tensors
from kimi_linear.models.kimi_linear.presets import preset


def build(name="tiny", **changes):
    config = dataclasses.replace(preset(name), **changes)
    model = KimiLinearForCausalLM(config, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for block in model.model.layers[1:]:
            # Halves of powers of two: exact in every dtype.
            block.mlp.gate.e_score_correction_bias.copy_(torch.arange(8) / 16)
    return model


def assert_same(model, other):
    tensors, others = model.state_dict(), other.state_dict()
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert others[name].dtype == tensor.dtype, name
        assert torch.equal(others[name], tensor), name


def weights(directory):
    """Every stored tensor by name."""
    return {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tie", [False, True])
def test_a_model_comes_back_bit_for_bit(tmp_path, dtype, tie):
    model = build(tie_embeddings=tie).to(dtype)
    model.save_pretrained(tmp_path / "model")
    loaded = KimiLinearForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    assert not loaded.training
    assert_same(model, loaded)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, loaded(ids).logits)


@pytest.mark.parametrize("name", ["tiny-gdn", "tiny-mla"])
def test_every_mixer_comes_back(tmp_path, name):
    model = build(name)
    model.save_pretrained(tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.config == model.config
    assert_same(model, loaded)


def test_the_release_layout_is_written(tmp_path):
    model = build().bfloat16()
    model.save_pretrained(tmp_path / "model")
    stored = weights(tmp_path / "model")
    expected = release_tensors(model.config)
    assert stored.keys() == expected.keys()
    for name, (shape, dtype) in expected.items():
        assert (tuple(stored[name].shape), stored[name].dtype) == (shape, getattr(torch, dtype)), name
    A_log = stored["model.layers.0.self_attn.A_log"]
    assert A_log.shape == (1, 1, 4, 1)
    assert A_log.dtype == torch.float32
    assert torch.equal(A_log.flatten(), model.model.layers[0].self_attn.A_log)
    assert torch.equal(
        stored["model.layers.1.block_sparse_moe.experts.5.w2.weight"], model.model.layers[1].mlp.experts.w2[5]
    )
    assert sum(tensor.nbytes for tensor in stored.values()) == release_bytes(model.config)


def test_the_configuration_is_the_released_type_where_it_fits(tmp_path):
    build().bfloat16().save_pretrained(tmp_path / "release")
    written = json.loads((tmp_path / "release" / "config.json").read_text())
    assert written["model_type"] == "kimi_linear"
    assert written["architectures"] == ["KimiLinearForCausalLM"]
    assert written["dtype"] == "bfloat16"
    assert written["linear_attn_config"]["full_attn_layers"] == [4]


def test_the_configuration_is_our_own_type_where_it_does_not_fit(tmp_path):
    model = build("tiny-gdn")
    model.save_pretrained(tmp_path / "own")
    written = json.loads((tmp_path / "own" / "config.json").read_text())
    assert written["model_type"] == "kimi_linear_hybrid"
    assert written["dtype"] == "float32"
    assert written["layers"] == list(model.config.layers)


def test_shards_are_bounded_and_indexed(tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "model", max_shard_size="200KB")
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 3
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    stored = weights(tmp_path / "model")
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_parameters"] == model.config.parameters()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    for file_name in files:
        shard = load_file(tmp_path / "model" / file_name)
        assert sum(tensor.nbytes for tensor in shard.values()) <= 200_000 or len(shard) == 1
    assert_same(model, load_model(tmp_path / "model"))


def test_saving_again_writes_the_same_bytes(tmp_path):
    build().bfloat16().save_pretrained(tmp_path / "first")
    load_model(tmp_path / "first").save_pretrained(tmp_path / "second")
    for path in (tmp_path / "first").iterdir():
        assert (tmp_path / "second" / path.name).read_bytes() == path.read_bytes()


def test_a_router_bias_that_does_not_fit_the_dtype_stays_float32(tmp_path):
    model = build().bfloat16()
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    with torch.no_grad():
        bias[0] += 1e-4
    model.save_pretrained(tmp_path / "model")
    stored = weights(tmp_path / "model")
    assert stored["model.layers.1.block_sparse_moe.gate.e_score_correction_bias"].dtype == torch.float32
    assert stored["model.layers.2.block_sparse_moe.gate.e_score_correction_bias"].dtype == torch.bfloat16
    loaded = load_model(tmp_path / "model")
    assert torch.equal(loaded.model.layers[1].mlp.gate.e_score_correction_bias, bias)


def test_a_dtype_casts_all_but_what_stays_float32(tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "model")
    for dtype in ("bfloat16", torch.bfloat16):
        loaded = load_model(tmp_path / "model", dtype=dtype)
        for name, tensor in loaded.state_dict().items():
            kept = name.endswith(("A_log", "dt_bias", "e_score_correction_bias"))
            assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), name
            assert torch.equal(tensor, model.state_dict()[name].to(tensor.dtype)), name


def test_generation_settings_and_the_tokenizer_go_along(tmp_path):
    (tmp_path / "tok.json").write_text("{}")
    model = build(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.end_token_ids = (2, 9)
    model.save_pretrained(tmp_path / "model", tokenizer_file=tmp_path / "tok.json")
    written = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert written == {"bos_token_id": 1, "eos_token_id": [2, 9], "pad_token_id": 0}
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "{}"
    assert load_model(tmp_path / "model").end_token_ids == (2, 9)


def test_special_tokens_are_left_out_where_there_are_none(tmp_path):
    build().save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text()) == {}
    assert load_model(tmp_path / "model").end_token_ids == ()
