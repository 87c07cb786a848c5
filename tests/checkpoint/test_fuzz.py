"""Ten thousand damaged checkpoints: each is refused with one sentence, or loads to exactly what is stored.

The cases are the same in every run. `--hypothesis-profile=long` tries twenty times as many, other ones each time.
"""

import copy
import json
import os
import time
from contextlib import chdir

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_linear.base.errors import CheckpointError, ConfigError, KimiLinearError
from kimi_linear.causal_lm import KimiLinearForCausalLM, load_model
from kimi_linear.checkpoint.configs import OWN_TYPE, model_json, read_config, read_model_json
from kimi_linear.checkpoint.hub import resolve
from kimi_linear.checkpoint.reader import open_shard, stored_tensors
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.models.kimi_linear.presets import preset
from kimi_linear.models.kimi_linear.state_dict import from_release
from kimi_linear.nn.config import BlockConfig
from kimi_linear.nn.ffn import MoEConfig, SwiGLUConfig
from kimi_linear.nn.mixers import KDAConfig, MLAConfig

INDEX = "model.safetensors.index.json"
# Of one case, in processor seconds; nearly all take milliseconds.
MOST_SECONDS = 5
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

TINY = KimiLinearConfig(
    vocab_size=7,
    hidden_size=4,
    blocks={
        "kda_dense": BlockConfig(mixer=KDAConfig(num_heads=1, head_dim=2), ffn=SwiGLUConfig(intermediate_size=3)),
        "mla": BlockConfig(
            mixer=MLAConfig(num_heads=1, kv_lora_rank=2, qk_nope_head_dim=2, qk_rope_head_dim=2, v_head_dim=2),
            ffn=MoEConfig(num_experts=2, top_k=1, intermediate_size=2),
        ),
    },
    layers=("kda_dense", "mla"),
)


def cases(count):
    """Settings of one property with so many cases."""
    chosen = settings.default.max_examples
    return settings(
        max_examples=count * chosen // 100,
        derandomize=chosen == 100,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def accepted(call, *args, error=CheckpointError, names=()):
    """Return what a call returns, or None where it refuses with one short sentence that holds all of the names."""
    start = time.process_time()
    result, refusal = None, None
    try:
        result = call(*args)
    except KimiLinearError as raised:
        refusal = raised
    assert time.process_time() - start < MOST_SECONDS
    if refusal is not None:
        message = str(refusal)
        assert type(refusal) is error
        assert message.isprintable()
        assert message.endswith(".")
        assert not message.endswith("..")
        assert len(message) < 2500
        assert all(name in message for name in names)
    return result


# --- damage ---

HOSTILE = [
    *(None, True, False, 0, 1, -1, 2, 3, 4, 8, 64, 2**31 - 1, 2**31, 2**63, 10**9, 10**18, 10**400),
    *(0.0, 0.5, 1.0, -1e-5, 1e308, 1e-320, float("nan"), float("inf"), "", "4", "silu", "kda", "mla", "gqa", "moe"),
    *("softmax", "linear_attention", "dense", "\n", "\x1b[2J", "\ud800", "x" * 3000, [], {}, [1], [[1]], [None] * 50),
    *([1, 2, 3], [4], ["dense"] * 4, ["full_attention"] * 4, {"kind": "swiglu"}, {"kind": []}, {"a": {"a": {}}}),
]
scalars = st.sampled_from(HOSTILE) | st.integers(-5, 100) | st.floats() | st.text(max_size=5)
values = st.sampled_from(HOSTILE) | st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
places = st.integers(0, 2**16)
edits = st.lists(st.tuples(places, st.sampled_from("sssda"), values, places), min_size=1, max_size=3)
bytes_edits = st.lists(
    st.tuples(places, st.sampled_from("fidxt"), st.binary(min_size=1, max_size=4)), min_size=1, max_size=4
)


def containers(value):
    """Every (container, key) of nested JSON, the outermost first."""
    found = []
    inside = [value]
    while inside:
        item = inside.pop(0)
        keys = list(item) if isinstance(item, dict) else range(len(item))
        found += [(item, key) for key in keys]
        inside += [item[key] for key in keys if isinstance(item[key], (dict, list))]
    return found


def edited(value, changes, keys=()):
    """Set, delete or add values anywhere in nested JSON; added are the given keys."""
    value = copy.deepcopy(value)
    for place, action, new, which in changes:
        spots = containers(value)
        if not spots:
            break
        container, key = spots[place % len(spots)]
        if action == "d":
            del container[key]
        elif action == "s":
            container[key] = copy.deepcopy(new)
        elif isinstance(container, dict):
            container[keys[which % len(keys)] if keys else str(which)] = copy.deepcopy(new)
        else:
            container.insert(key, copy.deepcopy(new))
    return value


def broken(content, changes):
    """Flip, insert, delete, repeat or cut bytes anywhere."""
    for place, action, new in changes:
        at = place % (len(content) + 1)
        if action == "f":
            content = content[:at] + new + content[at + len(new) :]
        elif action == "i":
            content = content[:at] + new + content[at:]
        elif action == "d":
            content = content[:at] + content[at + new[0] :]
        elif action == "x":
            content = content[:at] + content[at // 2 : at] + content[at:]
        else:
            content = content[:at]
    return content


# --- configurations ---

KEYS = [
    *("max_position_embeddings", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "top_k_experts"),
    *("n_shared_experts", "norm_topk_prob", "n_group", "scoring_func", "linear_head_dim", "linear_num_heads"),
    *("linear_conv_kernel_dim", "layer_types", "mlp_layer_types", "attn_res_block_size", "gate_lower_bound"),
    *("use_full_rank_gate", "latent_moe_use_norm", "mla_use_output_gate", "routed_expert_hidden_size", "torch_dtype"),
    *("kda_layers", "full_attn_layers", "model_type", "kind", "gate_activation", "window", "rope_theta", "a\nb"),
]
RELEASED = model_json(preset("tiny"), "bfloat16")
OWN = [preset(name).to_dict() for name in ("tiny", "tiny-gdn")] + [TINY.to_dict()]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("config")


def assert_whole(config):
    """What was accepted is a configuration of plain values that is written and read back as it is."""
    assert KimiLinearConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    written = json.loads(json.dumps(model_json(config, "float32")))
    assert read_config(written).shapes() == config.shapes()


@cases(4000)
@given(changes=edits)
def test_a_released_configuration_with_any_values(directory, changes):
    (directory / "config.json").write_text(json.dumps(edited(RELEASED, changes, KEYS)))
    config = accepted(read_model_json, directory, names=["config.json"])
    if config is not None:
        assert_whole(config)


@cases(1000)
@given(changes=bytes_edits)
def test_a_configuration_with_any_bytes(directory, changes):
    (directory / "config.json").write_bytes(broken(json.dumps(RELEASED).encode(), changes))
    config = accepted(read_model_json, directory, names=["config.json"])
    if config is not None:
        assert_whole(config)


@cases(2000)
@given(changes=edits, which=st.integers(0, len(OWN) - 1))
def test_a_configuration_of_our_own_type_with_any_values(changes, which):
    config = accepted(read_config, {**edited(OWN[which], changes, KEYS), "model_type": OWN_TYPE}, error=ConfigError)
    if config is not None:
        assert_whole(config)


# --- headers and indexes ---


def lay_out(tensors):
    """A header and its data; a tensor is (dtype, shape, bytes)."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    return header, data


def safetensors(header, data):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def read_back(content):
    """Read a file's tensors without the library: name -> (dtype, shape, bytes)."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found[name] = (entry["dtype"], tuple(entry["shape"]), content[start:][begin:end])
    return found


HEADER, DATA = lay_out(
    {
        "model.norm.weight": ("F32", [2, 3], bytes(range(24))),
        "a": ("BF16", [4], bytes(range(8))),
        "none": ("F16", [0, 2], b""),
        "one": ("F64", [], bytes(range(8))),
    }
)


def assert_as_stored(stored, directory):
    contents = {tensor.file: read_back(tensor.file.read_bytes()) for tensor in stored.values()}
    assert set(stored) == {name for content in contents.values() for name in content}
    for name, tensor in stored.items():
        dtype, shape, data = contents[tensor.file][name]
        assert (tensor.dtype, tensor.shape) == (dtype, shape)
        if dtype in DTYPES:
            with open_shard(tensor.file) as file:
                found = file.get_tensor(name)
            assert (found.dtype, tuple(found.shape)) == (DTYPES[dtype], shape)
            assert found.flatten().view(torch.uint8).numpy().tobytes() == data


def assert_reads(directory, content):
    (directory / "model.safetensors").write_bytes(content)
    stored = accepted(stored_tensors, directory, names=["model.safetensors"])
    if stored is not None:
        assert_as_stored(stored, directory)


@cases(1000)
@given(changes=edits, surplus=st.binary(max_size=8))
def test_a_header_with_any_values(directory, changes, surplus):
    assert_reads(directory, safetensors(edited(HEADER, changes), DATA + surplus))


@cases(700)
@given(changes=bytes_edits)
def test_a_file_with_any_bytes(directory, changes):
    assert_reads(directory, broken(safetensors(HEADER, DATA), changes))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sharded")
    for number in range(3):
        header, data = lay_out({f"t{number}": ("F32", [2], bytes(8)), f"u{number}": ("BF16", [1], bytes(2))})
        (directory / f"m{number}.safetensors").write_bytes(safetensors(header, data))
    return directory


PLACES = {f"{letter}{number}": f"m{number}.safetensors" for letter in "tu" for number in range(3)}


@cases(600)
@given(changes=edits | bytes_edits)
def test_an_index_with_any_values_or_bytes(sharded, changes):
    index = {"metadata": {"total_size": 30}, "weight_map": PLACES}
    by_value = len(changes[0]) == 4
    content = json.dumps(edited(index, changes) if by_value else index).encode()
    (sharded / INDEX).write_bytes(content if by_value else broken(content, changes))
    stored = accepted(stored_tensors, sharded, names=[str(sharded)])
    if stored is not None:
        assert json.loads((sharded / INDEX).read_bytes())["weight_map"] == {n: t.file.name for n, t in stored.items()}
        assert_as_stored(stored, sharded)


# --- whole checkpoints ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of several files, with their contents, to be damaged one file at a time."""
    directory = tmp_path_factory.mktemp("saved") / "model"
    model = KimiLinearForCausalLM(TINY, generator=torch.Generator().manual_seed(0)).bfloat16()
    model.save_pretrained(directory, max_shard_size=400)
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    return directory, {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def restore(directory, contents):
    for name, content in contents.items():
        if (directory / name).read_bytes() != content:
            (directory / name).write_bytes(content)


def assert_loaded(model, directory):
    """Compare a model with the bytes of its files, read without the library."""
    raw = {}
    for path in directory.glob("*.safetensors"):
        for name, (dtype, shape, data) in read_back(path.read_bytes()).items():
            raw[name] = torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]).view(shape)
    known = {name: tensor for name, tensor in raw.items() if not name.startswith("model.mtp.")}
    for name, tensor in from_release(known, model.config).items():
        loaded = model.state_dict()[name]
        torch.testing.assert_close(loaded, tensor.to(loaded.dtype), rtol=0, atol=0, equal_nan=True)


@cases(800)
@given(which=places, changes=bytes_edits | edits)
def test_a_checkpoint_with_one_damaged_file(saved, which, changes):
    directory, contents = saved
    restore(directory, contents)
    name = sorted(contents)[which % len(contents)]
    if name.endswith(".json") and len(changes[0]) == 4:
        (directory / name).write_text(json.dumps(edited(json.loads(contents[name]), changes, KEYS)))
    elif len(changes[0]) == 3:
        (directory / name).write_bytes(broken(contents[name], changes))
    else:
        (directory / name).unlink()
        (directory / name).write_bytes(b"")
    model = accepted(load_model, directory, names=[str(directory)])
    if model is not None:
        assert_loaded(model, directory)


# --- names ---

odd_text = st.text(st.sampled_from("ab/.~\\-_ \0\n\x1b\ud800é") | st.characters(), max_size=30)


@cases(500)
@given(name=odd_text | st.text("a/.-", max_size=12))
def test_any_name_of_a_checkpoint(directory, name):
    with chdir(directory):
        found = accepted(resolve, name)
        assert found is None or os.path.isdir(os.path.expanduser(name))
