"""Files made to crash, hang or exhaust a reader: each is refused with one sentence, in bounded time and memory."""

import json
import os
import pickle
import threading
import tracemalloc

import pytest
import torch

from kimi_linear.base.config import MAX_JSON_BYTES, read_json
from kimi_linear.base.errors import CheckpointError, ConfigError, KimiLinearError, list_names, plain, shown
from kimi_linear.causal_lm import KimiLinearForCausalLM, load_model
from kimi_linear.checkpoint import header
from kimi_linear.checkpoint.configs import OWN_TYPE, read_model_json
from kimi_linear.checkpoint.header import MAX_TENSORS
from kimi_linear.checkpoint.hub import resolve
from kimi_linear.checkpoint.reader import stored_tensors
from kimi_linear.models.kimi_linear.config import MAX_LAYERS
from kimi_linear.models.kimi_linear.presets import preset
from kimi_linear.recipes.inspect import inspect
from support.headers import index_json, shard_name, write_shard

INDEX = "model.safetensors.index.json"
# Of a refusal; the largest file that is read at all takes some thirty times its size.
MOST_BYTES = 100 * 2**20


@pytest.fixture(scope="module")
def model():
    return KimiLinearForCausalLM(preset("tiny"), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path, model):
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    return tmp_path / "model"


def refusal(call, *args):
    """Return the one sentence of a refusal that neither hangs nor takes memory."""
    outcome = []

    def run():
        tracemalloc.start()
        try:
            outcome.append(call(*args))
        except Exception as error:
            outcome.append(error)
        finally:
            outcome.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

    # A thread, so that what hangs fails the test and does not stop it.
    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    worker.join(60)
    assert not worker.is_alive(), "it hangs"
    error, peak = outcome
    assert isinstance(error, KimiLinearError), repr(error)
    message = str(error)
    assert message.isprintable()
    assert message.endswith(".")
    assert len(message) < 2500
    assert peak < MOST_BYTES, f"{peak:,} bytes"
    return message


def edit(path, change):
    given = json.loads(path.read_text())
    change(given)
    path.write_text(json.dumps(given))


# --- files that are not files ---


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX, "model-00001-of-00010.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "link to a pipe", "link to itself"])
def test_what_is_not_a_regular_file_is_refused_and_not_waited_for(saved, tmp_path, name, kind):
    total = len(list(saved.glob("*.safetensors")))
    path = saved / name.replace("00010", f"{total:05d}")
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    elif kind == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    else:
        path.symlink_to(path)
    if (name, kind) == ("generation_config.json", "link to itself"):
        # It leads nowhere, which is what a missing file does.
        load_model(saved)
        return
    message = refusal(load_model, saved)
    assert kind == "link to itself" or path.name in message


def test_a_pipe_as_the_single_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    assert "is not a regular file" in refusal(stored_tensors, tmp_path)


def test_links_to_files_are_followed_as_a_hub_cache_needs(saved, tmp_path, model):
    (tmp_path / "linked").mkdir()
    for file in saved.iterdir():
        (tmp_path / "linked" / file.name).symlink_to(file)
    assert torch.equal(load_model(tmp_path / "linked").lm_head.weight, model.lm_head.weight)


def test_a_pickle_under_a_safetensors_name_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    torch.save({"a": torch.ones(2)}, tmp_path / "zip.safetensors")
    assert "is not a whole safetensors file" in refusal(stored_tensors, tmp_path)
    (tmp_path / "zip.safetensors").rename(tmp_path / "model.safetensors")
    assert "is not a whole safetensors file" in refusal(stored_tensors, tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("call", [load_model, read_model_json, stored_tensors, resolve])
def test_what_may_not_be_looked_at_is_refused(saved, call):
    saved.parent.chmod(0)
    user = os.geteuid()
    # The superuser may look at everything.
    os.seteuid(user or 65534)
    try:
        refusal(call, saved)
    finally:
        os.seteuid(user)
        saved.parent.chmod(0o700)


# --- JSON ---

DEEP = 100_000
BAD_JSON = {
    "cut": (b'{"a": 1', "is not valid JSON"),
    "empty": (b"", "is not valid JSON"),
    "null": (b"null", "holds a JSON NoneType"),
    "not text": (b"\xff\xfe\x00", "cannot be read"),
    "byte order mark": (b"\xef\xbb\xbf{}", "is not valid JSON"),
    "deep lists": (b'{"a": ' + b"[" * DEEP + b"]" * DEEP + b"}", "is nested deeper than 64"),
    "deep objects": (b'{"a":' * DEEP + b"1" + b"}" * DEEP, "is nested deeper than 64"),
    "too deep to show": (b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}", "is nested deeper than 64"),
    "a key twice": (b'{"vocab_size": 1, "b": 2, "vocab_size": 3}', "gives the key 'vocab_size' more than once"),
    "a key twice inside": (b'{"a": [{"b": 1, "b": 1}]}', "gives the key 'b' more than once"),
    "a long number": (b'{"a": ' + b"9" * 5000 + b"}", "a number of too many digits"),
}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
@pytest.mark.parametrize("case", BAD_JSON)
def test_json_that_is_damaged_or_hostile_is_refused_by_file(saved, name, case):
    content, said = BAD_JSON[case]
    (saved / name).write_bytes(content)
    message = refusal(load_model, saved)
    assert name in message
    assert said in message


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
def test_a_huge_json_file_is_refused_without_being_read(saved, name):
    with (saved / name).open("r+b") as file:
        file.truncate(100 * 10**9)
    message = refusal(load_model, saved)
    assert name in message
    assert f"is larger than {MAX_JSON_BYTES} bytes" in message


def test_nesting_up_to_the_limit_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a":' * 63 + "1" + "}" * 63)
    read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"a":' * 64 + "1" + "}" * 64)
    with pytest.raises(ConfigError, match="nested deeper"):
        read_json(tmp_path / "a.json")


# --- configurations ---

HUGE = [10**9, 10**18, 10**4000, 2**63, -1, 0, 1.5, True, "8", [8], {}, float("nan"), float("inf"), "x" * 10**6]
SIZES = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank", "v_head_dim"]
SIZES += ["intermediate_size", "num_experts", "num_experts_per_token", "moe_intermediate_size", "model_max_length"]


@pytest.mark.parametrize("key", SIZES)
def test_a_size_that_is_none_is_refused_before_anything_of_its_size_is_made(saved, key):
    before = json.loads((saved / "config.json").read_text())
    for value in HUGE:
        if key == "model_max_length" and value == 10**9:
            continue
        (saved / "config.json").write_text(json.dumps({**before, key: value}))
        assert "config.json" in refusal(load_model, saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, "1e-5", True, [1e-5], -1.0])
@pytest.mark.parametrize("key", ["rms_norm_eps", "initializer_range"])
def test_a_number_that_is_none_is_refused_by_name(saved, key, value):
    edit(saved / "config.json", lambda given: given.update({key: value}))
    assert key.removeprefix("rms_") in refusal(load_model, saved)


@pytest.mark.parametrize("value", ["false", 0, [], {}])
@pytest.mark.parametrize("key", ["tie_word_embeddings", "moe_renormalize"])
def test_a_switch_that_is_none_is_refused_by_name(saved, key, value):
    edit(saved / "config.json", lambda given: given.update({key: value}))
    assert f"{key} is {value!r}, expected bool" in refusal(load_model, saved)


@pytest.mark.parametrize(
    "lists",
    [
        {"kda_layers": [1, 10**18]},
        {"kda_layers": [True, 2, 4]},
        {"kda_layers": "124", "full_attn_layers": [3]},
        {"kda_layers": {"1": 2}},
        {"kda_layers": [[1]]},
        {"kda_layers": [[1], {}], "full_attn_layers": None},
        {"kda_layers": [1] * 10**6},
        {"kda_layers": list(range(1, 10**6))},
        {"kda_layers": ["\n\x1b[2J"]},
    ],
)
def test_layer_lists_that_are_none_are_refused(saved, lists):
    edit(saved / "config.json", lambda given: given["linear_attn_config"].update(lists))
    assert "config.json" in refusal(load_model, saved)


@pytest.mark.parametrize("key", ["layer_types", "mlp_layer_types"])
@pytest.mark.parametrize("value", ["dense", {"dense": 1}, [[]], [None], ["dense\n"], 7, ["full_attention"] * 10**5])
def test_layer_names_that_are_none_are_refused(saved, key, value):
    def change(given):
        given.update({"linear_attn_config": {**given["linear_attn_config"], "kda_layers": None}})
        given["linear_attn_config"]["full_attn_layers"] = given["first_k_dense_replace"] = None
        given[key] = value

    edit(saved / "config.json", change)
    message = refusal(load_model, saved)
    assert key in message or "the layer lists name 100000 layers" in message


def test_more_layers_than_are_read_are_refused_by_number(saved):
    edit(saved / "config.json", lambda given: given.update(num_hidden_layers=MAX_LAYERS + 1))
    assert f"num_hidden_layers is {MAX_LAYERS + 1}, expected at most {MAX_LAYERS}" in refusal(load_model, saved)


def test_more_experts_than_are_read_are_refused_by_number(saved):
    edit(saved / "config.json", lambda given: given.update(num_experts=10**6))
    assert f"more tensors than the {MAX_TENSORS} that are read" in refusal(load_model, saved)


def test_a_block_name_of_our_own_type_does_not_reach_the_terminal_as_it_is(saved):
    own = {**preset("tiny").to_dict(), "model_type": OWN_TYPE}
    own["blocks"]["\x1b[2J\n"] = None
    (saved / "config.json").write_text(json.dumps(own))
    assert r"config.blocks.'\x1b[2J\n' is NoneType" in refusal(load_model, saved)


# --- indexes ---


@pytest.mark.parametrize(
    "name",
    [
        *("../m.safetensors", "/etc/m.safetensors", "a/m.safetensors", "a\\m.safetensors", "./m.safetensors"),
        *("m\0.safetensors", "m\n.safetensors", "\ud800.safetensors", "\x1b[2Jm.safetensors", "m.bin", "m" * 10**6),
        *(".safetensors/..", "", None, 1, ["m.safetensors"], {"a": 1}),
    ],
)
def test_an_index_names_only_plain_files_beside_it(saved, name):
    edit(saved / INDEX, lambda given: given["weight_map"].update({"model.norm.weight": name}))
    message = refusal(load_model, saved)
    assert "says that model.norm.weight is in" in message


def test_a_file_name_too_long_for_a_file_is_refused(saved):
    edit(saved / INDEX, lambda given: given["weight_map"].update({"a": "m" * 300 + ".safetensors"}))
    assert "cannot be opened: File name too long" in refusal(load_model, saved)


def test_an_index_of_very_many_files_is_refused_at_the_first_missing_one(saved):
    many = {f"t{number}": f"a{number}.safetensors" for number in range(200_000)}
    (saved / INDEX).write_text(json.dumps({"weight_map": many}))
    with pytest.raises(CheckpointError, match=r"a0\.safetensors does not exist") as caught:
        stored_tensors(saved)
    assert str(caught.value).endswith(".")


def test_an_index_of_a_million_files_is_refused_by_its_size(saved):
    entries = ",\n".join(f'"tensor.{number}": "{number}.safetensors"' for number in range(10**6))
    (saved / INDEX).write_text('{"weight_map": {' + entries + "}}")
    assert "is larger than" in refusal(stored_tensors, saved)


def test_a_tensor_that_two_files_hold_is_refused_by_name(tmp_path):
    shards = [{"a": ((2,), "F32"), "b": ((2,), "F32")}, {"c": ((2,), "F32")}]
    (tmp_path / INDEX).write_text(index_json(shards, 6))
    shards[1]["b"] = ((2,), "F32")
    for number, shard in enumerate(shards, start=1):
        write_shard(tmp_path / shard_name(number, 2), shard)
    message = refusal(stored_tensors, tmp_path)
    assert "model-00001-of-00002.safetensors and model-00002-of-00002.safetensors both hold b" in message


@pytest.mark.parametrize("size", [0, 10, -1, 10**30])
def test_an_index_that_counts_otherwise_than_its_files_is_odd_and_loads(saved, size):
    """Tools that edit checkpoints leave a stale count behind; the files themselves are whole."""
    edit(saved / INDEX, lambda given: given["metadata"].update(total_size=size))
    assert any(f"total_size {size}," in sentence for sentence in inspect(saved).odd)
    load_model(saved)


@pytest.mark.parametrize("metadata", [None, 7, [], {}, {"total_size": "many"}])
def test_an_index_need_not_count(saved, metadata):
    edit(saved / INDEX, lambda given: given.update(metadata=metadata))
    assert not any("the index claims" in sentence for sentence in inspect(saved).odd)


# --- headers ---


def raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(begin=0, end=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def twice(first, second):
    return b'{"a": %s, "a": %s}' % (json.dumps(first).encode(), json.dumps(second).encode())


HEADERS = {
    "nested lists": b"[" * DEEP,
    "nested objects": b'{"a":' * DEEP,
    "overlap": {"a": entry(0, 8), "b": entry(4, 12)},
    "gap": {"a": entry(0, 8), "b": entry(16, 24)},
    "backwards": {"a": entry(8, 0)},
    "beyond the file": {"a": entry(0, 8), "b": entry(8, 1000)},
    "far beyond the file": {"a": entry(0, 2**63, (2**61,))},
    "product of sizes": {"a": entry(shape=(2**32, 2**32))},
    "size": {"a": entry(shape=(2**63,))},
    "size of zero beside a huge one": {"a": entry(shape=(0, 2**63, 4))},
    "negative size": {"a": entry(shape=(-2,))},
    "fraction": {"a": entry(shape=(2.0,))},
    "shape of other bytes": {"a": entry(shape=(3,))},
    "dtype": {"a": entry(dtype="F33")},
    "dtype of another type": {"a": entry(dtype=32)},
    "half a byte": {"a": entry(0, 8, (15,), "F4")},
    "no entry": {"a": None},
    "text": {"a": "F32"},
    "metadata": {"__metadata__": {"a": 1}, "a": entry()},
    "not text": b'{"a\xff": 1}',
    "name of half a character": b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
    "a tensor twice": twice(entry(), entry()),
    "a tensor twice, of two types": twice(entry(), entry(dtype="I32")),
    "line end in a name": {"a\nb": entry(8, 16)},
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused_by_file(tmp_path, case):
    raw(tmp_path / "model.safetensors", HEADERS[case], b"\0" * 8)
    assert "model.safetensors is not a whole safetensors file" in refusal(stored_tensors, tmp_path)


@pytest.mark.parametrize("length", [0, 1, 100, 2**25 + 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_header_length_that_lies_is_refused(tmp_path, length):
    text = json.dumps({"a": entry()}).encode() + b"\0" * 8
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + text[:80])
    assert "model.safetensors is not a whole safetensors file" in refusal(stored_tensors, tmp_path)


def test_a_header_longer_than_is_read_is_refused_though_the_file_has_it(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((2**25 + 8).to_bytes(8, "little"))
    os.truncate(path, 2**26)
    assert f"the most that is read is {MAX_JSON_BYTES}" in refusal(stored_tensors, tmp_path)


@pytest.mark.parametrize("sharded", [False, True])
def test_more_tensors_than_are_read_are_refused_by_number(tmp_path, monkeypatch, sharded):
    monkeypatch.setattr(header, "MAX_TENSORS", 99)
    tensors = {str(number): ((0,), "F32") for number in range(110)}
    if sharded:
        shards = [{name: tensors[name] for name in part} for part in (list(tensors)[:55], list(tensors)[55:])]
        (tmp_path / INDEX).write_text(index_json(shards, 0))
        for number, shard in enumerate(shards, start=1):
            write_shard(tmp_path / shard_name(number, 2), shard)
    else:
        write_shard(tmp_path / "model.safetensors", tensors)
    assert "tensors, expected at most 99." in refusal(stored_tensors, tmp_path)


@pytest.mark.parametrize(
    ("name", "shape"), [("model.norm.weight", (0,)), ("x\n\x1b[2J", (0,)), ("x" * 10**6, ()), ("a", (1,) * 10**5)]
)
def test_tensors_that_are_whole_and_do_not_fit_are_named_in_one_short_line(saved, name, shape):
    path = saved / shard_name(1, 1)
    for file in saved.glob("*.safetensors*"):
        file.unlink()
    write_shard(path, {name: (shape, "F32")})
    path.rename(saved / "model.safetensors")
    assert "the tensors do not fit config.json" in refusal(load_model, saved)


# --- names of checkpoints ---


@pytest.mark.parametrize(
    "name",
    [
        *("", "\0", "a\0b", "a\nb", "\x1b[2J", "\ud800", "x" * 10**5, "a/" * 10**4),
        *("~nobody-of-this-name/x", "org/model\n", "org/..", "org/\ud800", "file\\x", "C:\\x", "org/model/../.."),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    refusal(resolve, name)


# --- what messages quote ---


def test_what_is_quoted_is_short_and_printable():
    assert plain("model.norm.weight") == "model.norm.weight"
    assert plain("a\nb") == r"'a\nb'"
    assert shown(3) == "3"
    for value in ["x" * 10**6, "\x1b" * 10**6, [[[1] * 99] * 99] * 99, dict.fromkeys("abcdefg", "y" * 999), 10**4000]:
        assert len(shown(value)) <= 200
        assert shown(value).isprintable()
        assert plain(str(value)[:4000]).isprintable()
        assert len(plain(str(value)[:4000])) <= 200
    assert list_names(["b\n", "a"]) == r"a, 'b\n'"


def test_a_wrong_configuration_is_refused_as_a_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"config\.json holds a JSON list"):
        read_model_json(tmp_path)
