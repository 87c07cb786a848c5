"""Every tensor survives the way through the release's layout, and through transformers, byte for byte."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimi_linear.base.errors import CheckpointError
from kimi_linear.causal_lm import KimiLinearForCausalLM
from kimi_linear.models.kimi_linear.release_config import to_release_config
from support.awkward import AWKWARD, STORED, lively_model
from support.transformers import ABSENT, ROPE_WARNING, load_in_transformers

pytest.importorskip("transformers", reason=ABSENT)
pytestmark = pytest.mark.filterwarnings(ROPE_WARNING)

FLOAT32 = ("A_log", "dt_bias")


def stored(directory):
    return {name: x for path in sorted(directory.glob("*.safetensors")) for name, x in load_file(path).items()}


def assert_equal_bytes(tensors, expected, but=()):
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        if not name.endswith(but or ("?",)):
            assert tensor.dtype == expected[name].dtype, name
            assert tensor.shape == expected[name].shape, name
            assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name


def saved_again(directory, target, name):
    """What is stored of a directory after we load it and save it; its network is the shape's."""
    model = KimiLinearForCausalLM.from_pretrained(directory, dtype=STORED[name])
    assert to_release_config(model.config) == to_release_config(AWKWARD[name])
    model.save_pretrained(target)
    return stored(target)


@pytest.fixture(params=AWKWARD)
def shape(request, tmp_path):
    """A shape's name and the directory of its model in the release's layout."""
    lively_model(request.param).save_pretrained(tmp_path / "release")
    return request.param, tmp_path / "release"


def test_the_release_layout_comes_back_in_one_file_and_in_shards(shape, tmp_path):
    name, release = shape
    expected = stored(release)
    model = KimiLinearForCausalLM.from_pretrained(release)
    model.save_pretrained(tmp_path / "sharded", max_shard_size=20_000)
    weight_map = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(weight_map.values())) > 3
    assert_equal_bytes(stored(tmp_path / "sharded"), expected)
    assert_equal_bytes(saved_again(tmp_path / "sharded", tmp_path / "one", name), expected)


@pytest.mark.parametrize("original_format", [True, False], ids=["its default", "its own names"])
def test_what_transformers_saves_comes_back(shape, tmp_path, original_format):
    name, release = shape
    # In float32, which holds every dtype exactly; transformers would round what stays float32 to a smaller one.
    model, _ = load_in_transformers(release)
    model.save_pretrained(tmp_path / "theirs", save_original_format=original_format, max_shard_size="100KB")
    names = stored(tmp_path / "theirs").keys()
    assert any(".self_attn.forget_gate." in n for n in names) is not original_format
    assert_equal_bytes(saved_again(tmp_path / "theirs", tmp_path / "ours", name), stored(release))


def test_a_state_dict_of_transformers_saved_by_hand_comes_back(shape, tmp_path):
    name, release = shape
    model, _ = load_in_transformers(release)
    (tmp_path / "theirs").mkdir()
    state = {n: x.clone() for n, x in model.state_dict().items()}
    save_file(state, tmp_path / "theirs" / "model.safetensors")
    model.config.save_pretrained(tmp_path / "theirs")
    assert_equal_bytes(saved_again(tmp_path / "theirs", tmp_path / "ours", name), stored(release))


def test_transformers_keeps_all_but_what_stays_float32_in_the_stored_dtype(tmp_path):
    """What transformers rounds (decay rates, gate biases) is rounded in the file; we keep it in float32 again."""
    lively_model("first-mla").save_pretrained(tmp_path / "release")
    model, _ = load_in_transformers(tmp_path / "release", dtype="auto")
    model.save_pretrained(tmp_path / "theirs")
    ours = saved_again(tmp_path / "theirs", tmp_path / "ours", "first-mla")
    expected = stored(tmp_path / "release")
    assert_equal_bytes(ours, expected, but=FLOAT32)
    for name in ours:
        if name.endswith(FLOAT32):
            assert torch.equal(ours[name], expected[name].bfloat16().float()), name


def test_a_configuration_that_transformers_made_alone_loads(tmp_path):
    """No linear_attn_config and no first_k_dense_replace: layers are listed by type, sizes have names of their own."""
    transformers = pytest.importorskip("transformers", reason=ABSENT)
    config = transformers.KimiLinearConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        linear_head_dim=16,
        linear_num_heads=2,
        layer_types=["full_attention", "linear_attention", "full_attention"],
        mlp_layer_types=["sparse", "dense", "sparse"],
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 2),
    )
    torch.manual_seed(0)
    theirs = transformers.KimiLinearForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "m")
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    assert not {"linear_attn_config", "first_k_dense_replace"} & written.keys()
    ours = KimiLinearForCausalLM.from_pretrained(tmp_path / "m")
    assert [(b.mixer.kind, b.ffn.kind) for b in ours.config.layer_blocks] == [
        ("mla", "moe"),
        ("kda", "swiglu"),
        ("mla", "moe"),
    ]
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        a, b = ours(ids).logits, theirs(ids).logits
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_the_parameters_that_need_it_are_float32_from_every_layout_and_in_every_dtype(tmp_path):
    lively_model("first-mla").save_pretrained(tmp_path / "release")
    theirs, _ = load_in_transformers(tmp_path / "release", dtype=torch.bfloat16)
    for original_format in (True, False):
        theirs.save_pretrained(tmp_path / "m", save_original_format=original_format)
        for dtype in (None, "bfloat16", "float16"):
            state = KimiLinearForCausalLM.from_pretrained(tmp_path / "m", dtype=dtype).state_dict()
            kept = [n for n in state if n.endswith((*FLOAT32, "e_score_correction_bias"))]
            assert len(kept) == 2 * 3 + 5
            assert {state[n].dtype for n in kept} == {torch.float32}


def test_a_tied_model_has_its_embedding_as_head_there_and_comes_back_tied(tmp_path):
    lively_model("two-dense").save_pretrained(tmp_path / "m")
    theirs, _ = load_in_transformers(tmp_path / "m")
    assert torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight)
    # transformers does not tie them: a head that was trained on its own must not be lost.
    with torch.no_grad():
        theirs.lm_head.weight[0, 0] += 1
    theirs.save_pretrained(tmp_path / "trained")
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        KimiLinearForCausalLM.from_pretrained(tmp_path / "trained")
