"""What is published of the released checkpoint follows from its config.json alone, to the byte."""

import hashlib
import json
import math
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_linear.base.errors import CheckpointError
from kimi_linear.checkpoint.configs import read_model_json
from kimi_linear.checkpoint.layout import check_fits
from kimi_linear.checkpoint.reader import declared_bytes, stored_tensors
from kimi_linear.checkpoint.writer import parse_size, split_shards
from kimi_linear.models.kimi_linear.dialects import RELEASE
from kimi_linear.models.kimi_linear.keys import release_tensors
from kimi_linear.recipes.inspect import inspect
from support.headers import file_size, index_json, nbytes, shard_name, write_shard

# moonshotai/Kimi-Linear-48B-A3B-Instruct, revision e1df551a447157d4658b573f9a695d57658590e9.
CONFIG = {
    "architectures": ["KimiLinearForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_kimi.KimiLinearConfig",
        "AutoModel": "modeling_kimi.KimiLinearModel",
        "AutoModelForCausalLM": "modeling_kimi.KimiLinearForCausalLM",
    },
    "bos_token_id": 163584,
    "dtype": "bfloat16",
    "eos_token_id": 163586,
    "first_k_dense_replace": 1,
    "head_dim": 72,
    "hidden_act": "silu",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "kv_lora_rank": 512,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "head_dim": 128,
        "kda_layers": [1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26],
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
    "mla_use_nope": True,
    "model_max_length": 1048576,
    "model_type": "kimi_linear",
    "moe_intermediate_size": 1024,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "num_attention_heads": 32,
    "num_expert_group": 1,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_hidden_layers": 27,
    "num_key_value_heads": 32,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "pad_token_id": 163839,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.446,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "transformers_version": "4.57.1",
    "use_cache": True,
    "use_grouped_topk": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}
CONFIG_TEXT = json.dumps(CONFIG, indent=2) + "\n"
CONFIG_SHA256 = "a6ac3c2c4b5aa72370f9727f49ffa4432715d20061889acdb37c688be853096e"
INDEX_SHA256 = "e63dba2b42cfe38ad7f2fd7cf561706c584f8fe7b42016baba16b27fe0d06bab"
SHARD_SIZES = [
    *(4999482712, 4999923264, 4997138040, 4997148016, 4999923296, 4997138040, 4997148128, 4999924384, 4997139104),
    *(4997149016, 4999924408, 4997139104, 4997148992, 4999924440, 4997139104, 4997148960, 4999924472, 4997139104),
    *(4999934384, 3280687152),
]
TOTAL_BYTES, TOTAL_PARAMETERS = 98_245_528_576, 49_122_681_728
MLA_LAYERS = (3, 7, 11, 15, 19, 23, 26)

# The published tables of tensors, in the order in which the published code registers its modules: the shards were cut
# along it. BF16 where nothing else is said.
KDA = {
    "A_log": ((1, 1, 32, 1), "F32"),
    "dt_bias": ((4096,), "F32"),
    **{f"{x}_proj.weight": (4096, 2304) for x in "qkv"},
    **{f"{x}_conv1d.weight": (4096, 1, 4) for x in "qkv"},
    "f_a_proj.weight": (128, 2304),
    "f_b_proj.weight": (4096, 128),
    "b_proj.weight": (32, 2304),
    "g_a_proj.weight": (128, 2304),
    "g_b_proj.weight": (4096, 128),
    "o_norm.weight": (128,),
    "o_proj.weight": (2304, 4096),
}
MLA = {
    "q_proj.weight": (6144, 2304),
    "kv_a_proj_with_mqa.weight": (576, 2304),
    "kv_a_layernorm.weight": (512,),
    "kv_b_proj.weight": (8192, 512),
    "o_proj.weight": (2304, 4096),
}
DENSE = {"gate_proj.weight": (9216, 2304), "up_proj.weight": (9216, 2304), "down_proj.weight": (2304, 9216)}
EXPERT = {"w1.weight": (1024, 2304), "w2.weight": (2304, 1024), "w3.weight": (1024, 2304)}
MOE = {
    **{f"experts.{e}.{name}": shape for e in range(256) for name, shape in EXPERT.items()},
    "gate.weight": (256, 2304),
    "gate.e_score_correction_bias": (256,),
    "shared_experts.gate_proj.weight": (1024, 2304),
    "shared_experts.up_proj.weight": (1024, 2304),
    "shared_experts.down_proj.weight": (2304, 1024),
}


def published():
    """Every tensor of the release by name, shape and dtype, from the tables."""
    tables = {"model.embed_tokens.weight": (163840, 2304)}
    for layer in range(27):
        attention = MLA if layer in MLA_LAYERS else KDA
        ffn, ffn_name = (DENSE, "mlp") if layer == 0 else (MOE, "block_sparse_moe")
        parts = {f"self_attn.{name}": entry for name, entry in attention.items()}
        parts |= {f"{ffn_name}.{name}": entry for name, entry in ffn.items()}
        parts |= {"input_layernorm.weight": (2304,), "post_attention_layernorm.weight": (2304,)}
        tables |= {f"model.layers.{layer}.{name}": entry for name, entry in parts.items()}
    tables |= {"model.norm.weight": (2304,), "lm_head.weight": (163840, 2304)}
    return {name: entry if entry[-1] == "F32" else (entry, "BF16") for name, entry in tables.items()}


TENSORS = published()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("config")
    (directory / "config.json").write_text(CONFIG_TEXT)
    return read_model_json(directory)


@pytest.fixture(scope="module")
def shards():
    """The published tensors as our own writer cuts them, given their order."""
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32}
    empty = {n: torch.empty(shape, dtype=dtypes[dtype], device="meta") for n, (shape, dtype) in TENSORS.items()}
    return [{name: TENSORS[name] for name in shard} for shard in split_shards(empty, parse_size("5GB"))]


@pytest.fixture(scope="module")
def full_size(tmp_path_factory, shards):
    """The released checkpoint with all of its headers and none of its data."""
    directory = tmp_path_factory.mktemp("release")
    (directory / "config.json").write_text(CONFIG_TEXT)
    for number, shard in enumerate(shards, start=1):
        write_shard(directory / shard_name(number, len(shards)), shard)
    (directory / "model.safetensors.index.json").write_text(index_json(shards, TOTAL_PARAMETERS))
    return directory


def test_the_configuration_here_is_the_published_file():
    assert len(CONFIG_TEXT) == 1751
    assert hashlib.sha256(CONFIG_TEXT.encode()).hexdigest() == CONFIG_SHA256


def test_the_schedule_follows_from_the_configuration(config):
    kinds = [(block.mixer.kind, block.ffn.kind) for block in config.layer_blocks]
    assert tuple(i for i, (mixer, _) in enumerate(kinds) if mixer == "mla") == MLA_LAYERS
    assert Counter(kinds) == {("kda", "swiglu"): 1, ("kda", "moe"): 19, ("mla", "moe"): 7}
    assert kinds[0] == ("kda", "swiglu")


def test_every_name_shape_and_dtype_follows_from_the_configuration(config):
    names = {"bfloat16": "BF16", "float32": "F32"}
    derived = {name: (shape, names[dtype]) for name, (shape, dtype) in release_tensors(config, "bfloat16").items()}
    assert derived == TENSORS
    assert len(derived) == 20_493
    assert sum(map(nbytes, derived.values())) == TOTAL_BYTES
    assert [name for name, (_, dtype) in derived.items() if dtype == "F32"] == [
        f"model.layers.{i}.self_attn.{name}" for i in range(27) if i not in MLA_LAYERS for name in ("A_log", "dt_bias")
    ]


def test_the_parameter_counts_are_the_published_ones(config):
    kda_moe, mla_moe = config.layer_blocks[1], config.layer_blocks[3]
    assert kda_moe.mixer.parameters(2304) == 39_514_272
    assert mla_moe.mixer.parameters(2304) == 29_114_880
    assert config.layer_blocks[0].ffn.parameters(2304) == 63_700_992
    assert kda_moe.ffn.parameters(2304) == 1_819_607_296
    assert kda_moe.ffn.active_parameters(2304) == 64_291_072
    assert config.layer_blocks[0].parameters(2304) == 103_219_872
    assert kda_moe.parameters(2304) == 1_859_126_176
    assert mla_moe.parameters(2304) == 1_848_726_784
    assert config.parameters() == TOTAL_PARAMETERS
    assert config.active_parameters(embedding=False, head=False) == 2_729_485_184
    assert config.active_parameters() == 3_106_972_544
    assert config.active_parameters(embedding=True) == 3_484_459_904


def test_the_twenty_shards_have_their_published_sizes(shards):
    assert [file_size(shard) for shard in shards] == SHARD_SIZES


def test_the_index_is_the_published_file(shards):
    text = index_json(shards, sum(math.prod(shape) for shape, _ in TENSORS.values()))
    assert len(text) == 1_987_740
    assert hashlib.sha256(text.encode()).hexdigest() == INDEX_SHA256


def test_the_release_fits_its_configuration(full_size, config):
    stored = stored_tensors(full_size)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in stored.items()} == TENSORS
    moves = check_fits(stored, config, full_size)
    assert {move.stored: move.release for move in moves} == dict(zip(TENSORS, TENSORS, strict=True))
    assert {move.dialect for move in moves} == {RELEASE}
    assert declared_bytes(full_size) == TOTAL_BYTES


def error_of(directory, config):
    with pytest.raises(CheckpointError) as caught:
        check_fits(stored_tensors(directory), config, directory)
    message = str(caught.value)
    assert message.isprintable()
    assert message.endswith(".")
    assert len(message) < 2000
    return message


VICTIM = "model.layers.13.block_sparse_moe.experts.200.w2.weight"


def edited(shard, fault):
    """A shard with one thing wrong about VICTIM, and what must be said of it."""
    shape, dtype = shard[VICTIM]
    rest = {name: tensor for name, tensor in shard.items() if name != VICTIM}
    return {
        "wrong": ({**rest, VICTIM + "s": (shape, dtype)}, f"{VICTIM}s"),
        "missing": (rest, f"1 missing ({VICTIM})"),
        "extra": ({**shard, VICTIM + "s": (shape, dtype)}, f"1 unexpected ({VICTIM}s)"),
        "dtype": ({**rest, VICTIM: (shape, "I8")}, f"({VICTIM} I8)"),
        "shape": ({**rest, VICTIM: (shape[::-1], dtype)}, f"{VICTIM} [1024, 2304] instead of [2304, 1024]"),
    }[fault]


@pytest.mark.parametrize("fault", ["wrong", "missing", "extra", "dtype", "shape"])
def test_one_thing_wrong_with_one_of_20493_tensors_is_said_by_name(full_size, shards, config, fault):
    """In the file and in the index alike, so that only the configuration contradicts."""
    number = next(n for n, shard in enumerate(shards) if VICTIM in shard)
    changed, said = edited(shards[number], fault)
    index = full_size / "model.safetensors.index.json"
    path, before = full_size / shard_name(number + 1, len(shards)), index.read_text()
    write_shard(path, changed)
    index.write_text(index_json([*shards[:number], changed, *shards[number + 1 :]], TOTAL_PARAMETERS))
    try:
        assert said in error_of(full_size, config)
    finally:
        write_shard(path, shards[number])
        index.write_text(before)


INDEX_FAULTS = {
    "missing": (lambda places, name: places.pop(name), "does not name tensors that its files hold ({})"),
    "extra": (lambda places, name: places.update({name + "s": places[name]}), "that no file holds ({}s)"),
    "wrong": (lambda places, name: places.update({name + "s": places.pop(name)}), "that no file holds ({}s)"),
    "misplaced": (
        lambda places, name: places.update({name: sorted({*places.values()} - {places[name]})[0]}),
        "names tensors in another file than the one that holds them ({})",
    ),
    "number": (lambda places, name: places.update({name: 7}), "says that {} is in 7, expected the name"),
    "list": (lambda places, name: places.update({name: [places[name]]}), "says that {} is in ['model-"),
    "nothing": (lambda places, name: places.update({name: None}), "says that {} is in None"),
    "no file": (
        lambda places, name: places.update({name: "model-00021-of-00020.safetensors"}),
        "model-00021-of-00020.safetensors does not exist",
    ),
}


@pytest.mark.parametrize("fault", INDEX_FAULTS)
def test_one_wrong_entry_of_the_full_index_is_said_by_name(full_size, config, fault):
    change, said = INDEX_FAULTS[fault]
    path = full_size / "model.safetensors.index.json"
    before = path.read_text()
    index = json.loads(before)
    change(index["weight_map"], VICTIM)
    path.write_text(json.dumps(index))
    try:
        assert said.format(VICTIM) in error_of(full_size, config)
    finally:
        path.write_text(before)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The release with small sizes, four layers and four shards, to be damaged anywhere: its directory and tensors."""
    linear = {**CONFIG["linear_attn_config"], "kda_layers": [1, 2, 3], "full_attn_layers": [4], "head_dim": 4}
    sizes = {"hidden_size": 8, "intermediate_size": 16, "moe_intermediate_size": 8, "kv_lora_rank": 4, "num_experts": 8}
    given = {**CONFIG, **sizes, "vocab_size": 163840, "num_hidden_layers": 4, "linear_attn_config": linear}
    directory = tmp_path_factory.mktemp("small")
    (directory / "config.json").write_text(json.dumps(given))
    config = read_model_json(directory)
    names = {"bfloat16": "BF16", "float32": "F32"}
    tensors = [(name, (shape, names[dtype])) for name, (shape, dtype) in release_tensors(config).items()]
    return directory, config, [dict(tensors[start : start + 40]) for start in range(0, len(tensors), 40)]


def lay_out(directory, shards):
    for number, shard in enumerate(shards, start=1):
        write_shard(directory / shard_name(number, len(shards)), shard)
    (directory / "model.safetensors.index.json").write_text(index_json(shards, 0))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.3.self_attn.kv_b_proj.weight"])
def test_a_tensor_of_another_float_dtype_loads_and_is_odd_by_name(small, name):
    directory, config, shards = small
    lay_out(directory, [{n: (t[0], "F32" if n == name else t[1]) for n, t in shard.items()} for shard in shards])
    check_fits(stored_tensors(directory), config, directory)
    assert any(f"1 F32; not BF16: {name}." in sentence for sentence in inspect(directory).odd)


def test_the_release_itself_is_not_odd_in_its_dtypes(small):
    directory, _, shards = small
    lay_out(directory, shards)
    assert not any("as the rest is" in sentence for sentence in inspect(directory).odd)


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_one_wrong_tensor_anywhere_is_said_by_name(small, data):
    directory, config, shards = small
    number = data.draw(st.integers(0, len(shards) - 1))
    name = data.draw(st.sampled_from(sorted(shards[number])))
    shape, dtype = shards[number][name]
    fault = data.draw(st.sampled_from(["missing", "extra", "dtype", "shape"]))
    changed = dict(shards[number])
    if fault == "missing":
        del changed[name]
    elif fault == "extra":
        changed[name + "_"] = (shape, dtype)
    elif fault == "dtype":
        changed[name] = (shape, data.draw(st.sampled_from(["I8", "I64"])))
    else:
        changed[name] = ((*shape[:-1], shape[-1] + 1), dtype)
    lay_out(directory, [*shards[:number], changed, *shards[number + 1 :]])
    message = error_of(directory, config)
    assert {
        "missing": f"1 missing ({name})",
        "extra": f"1 unexpected ({name}_)",
        "dtype": f"({name} I",
        "shape": f"1 of another shape ({name} [",
    }[fault] in message


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_one_wrong_entry_of_an_index_anywhere_is_said_by_name(small, data):
    directory, config, shards = small
    lay_out(directory, shards)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = data.draw(st.sampled_from(sorted(index["weight_map"])))
    change, said = INDEX_FAULTS[data.draw(st.sampled_from(sorted(INDEX_FAULTS)))]
    change(index["weight_map"], name)
    path.write_text(json.dumps(index))
    assert said.format(name) in error_of(directory, config)
