"""The released checkpoint's tensors: names, shapes, dtypes, bytes, and the way there and back."""

import collections
import re

import pytest
import torch

from kimi_linear.base.errors import CheckpointError
from kimi_linear.models.kimi_linear.keys import key_maps, release_bytes, release_tensors
from kimi_linear.models.kimi_linear.model import KimiLinearLM
from kimi_linear.models.kimi_linear.presets import PRESETS, preset
from kimi_linear.models.kimi_linear.state_dict import from_release, to_release

RELEASED = preset("48b-a3b")


def test_the_released_model_has_its_published_tensors_and_bytes() -> None:
    tensors = release_tensors(RELEASED)
    assert len(tensors) == 20_493
    assert release_bytes(RELEASED) == 98_245_528_576
    counts = collections.Counter(dtype for _, dtype in tensors.values())
    assert counts == {"bfloat16": 20_453, "float32": 40}


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("model.embed_tokens.weight", (163840, 2304), "bfloat16"),
        ("model.norm.weight", (2304,), "bfloat16"),
        ("lm_head.weight", (163840, 2304), "bfloat16"),
        ("model.layers.0.input_layernorm.weight", (2304,), "bfloat16"),
        ("model.layers.26.post_attention_layernorm.weight", (2304,), "bfloat16"),
        ("model.layers.0.self_attn.q_proj.weight", (4096, 2304), "bfloat16"),
        ("model.layers.0.self_attn.v_conv1d.weight", (4096, 1, 4), "bfloat16"),
        ("model.layers.0.self_attn.A_log", (1, 1, 32, 1), "float32"),
        ("model.layers.25.self_attn.dt_bias", (4096,), "float32"),
        ("model.layers.25.self_attn.f_a_proj.weight", (128, 2304), "bfloat16"),
        ("model.layers.25.self_attn.f_b_proj.weight", (4096, 128), "bfloat16"),
        ("model.layers.25.self_attn.b_proj.weight", (32, 2304), "bfloat16"),
        ("model.layers.25.self_attn.g_a_proj.weight", (128, 2304), "bfloat16"),
        ("model.layers.25.self_attn.g_b_proj.weight", (4096, 128), "bfloat16"),
        ("model.layers.25.self_attn.o_norm.weight", (128,), "bfloat16"),
        ("model.layers.25.self_attn.o_proj.weight", (2304, 4096), "bfloat16"),
        ("model.layers.3.self_attn.q_proj.weight", (6144, 2304), "bfloat16"),
        ("model.layers.26.self_attn.kv_a_proj_with_mqa.weight", (576, 2304), "bfloat16"),
        ("model.layers.26.self_attn.kv_a_layernorm.weight", (512,), "bfloat16"),
        ("model.layers.26.self_attn.kv_b_proj.weight", (8192, 512), "bfloat16"),
        ("model.layers.26.self_attn.o_proj.weight", (2304, 4096), "bfloat16"),
        ("model.layers.0.mlp.gate_proj.weight", (9216, 2304), "bfloat16"),
        ("model.layers.0.mlp.down_proj.weight", (2304, 9216), "bfloat16"),
        ("model.layers.1.block_sparse_moe.gate.weight", (256, 2304), "bfloat16"),
        ("model.layers.1.block_sparse_moe.gate.e_score_correction_bias", (256,), "bfloat16"),
        ("model.layers.26.block_sparse_moe.experts.255.w1.weight", (1024, 2304), "bfloat16"),
        ("model.layers.26.block_sparse_moe.experts.0.w3.weight", (1024, 2304), "bfloat16"),
        ("model.layers.26.block_sparse_moe.experts.0.w2.weight", (2304, 1024), "bfloat16"),
        ("model.layers.26.block_sparse_moe.shared_experts.down_proj.weight", (2304, 1024), "bfloat16"),
    ],
)
def test_a_released_tensor_has_its_published_shape_and_dtype(name: str, shape: tuple[int, ...], dtype: str) -> None:
    assert release_tensors(RELEASED)[name] == (shape, dtype)


def test_layers_have_their_published_number_of_tensors() -> None:
    per_layer = collections.Counter(
        int(match[1]) for name in release_tensors(RELEASED) if (match := re.match(r"model\.layers\.(\d+)\.", name))
    )
    kda_dense, kda, mla = 17 + 3, 17 + 5 + 768, 7 + 5 + 768
    full = {3, 7, 11, 15, 19, 23, 26}
    assert per_layer == {i: kda_dense if i == 0 else mla if i in full else kda for i in range(27)}


@pytest.mark.parametrize("name", PRESETS)
def test_the_names_are_a_bijection(name: str) -> None:
    config = preset(name)
    maps = key_maps(config)
    released = [name for key in maps for name in key.release]
    assert len(set(released)) == len(released) == len(release_tensors(config))
    assert [key.module for key in maps] == list(config.shapes())


@pytest.mark.parametrize("name", ["tiny", "tiny-gdn", "tiny-mla"])
def test_a_state_dict_comes_back_bit_identical_from_the_release_layout(name: str) -> None:
    config = preset(name)
    state = KimiLinearLM(config).state_dict()
    released = to_release(state, config)
    assert {n: tuple(t.shape) for n, t in released.items()} == {n: s for n, (s, _) in release_tensors(config).items()}
    back = from_release(released, config)
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(back[key], tensor), key
        assert back[key].shape == tensor.shape


def test_each_expert_has_its_own_tensor() -> None:
    config = preset("tiny")
    model = KimiLinearLM(config)
    released = to_release(model.state_dict(), config)
    for expert in range(8):
        for name in ("w1", "w2", "w3"):
            stacked = model.state_dict()[f"model.layers.2.mlp.experts.{name}"]
            single = released[f"model.layers.2.block_sparse_moe.experts.{expert}.{name}.weight"]
            assert torch.equal(single, stacked[expert])


def test_a_loaded_model_computes_the_same() -> None:
    config = preset("tiny")
    one, two = KimiLinearLM(config).eval(), KimiLinearLM(config).eval()
    two.load_state_dict(from_release(to_release(one.state_dict(), config), config))
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(one(ids).logits, two(ids).logits)


def test_shapes_in_circulation_that_differ_by_axes_of_one_are_accepted() -> None:
    config = preset("tiny")
    state = KimiLinearLM(config).state_dict()
    released = to_release(state, config)
    released["model.layers.0.self_attn.A_log"] = released["model.layers.0.self_attn.A_log"].flatten()
    name = "model.layers.0.self_attn.q_conv1d.weight"
    released[name] = released[name].squeeze(1)
    back = from_release(released, config)
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())


def test_missing_unknown_and_misshapen_tensors_are_refused_by_name() -> None:
    config = preset("tiny")
    state = KimiLinearLM(config).state_dict()
    released = to_release(state, config)
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    with pytest.raises(CheckpointError, match=re.escape(name)):
        from_release({n: t for n, t in released.items() if n != name}, config)
    with pytest.raises(CheckpointError, match="1 unknown tensors, the first 'extra'"):
        from_release({**released, "extra": torch.zeros(1)}, config)
    with pytest.raises(CheckpointError, match=r"\[32, 64\], expected \[64, 32\]"):
        from_release({**released, name: released[name].T}, config)
    with pytest.raises(CheckpointError, match="lm_head"):
        to_release({n: t for n, t in state.items() if n != "lm_head.weight"}, config)
