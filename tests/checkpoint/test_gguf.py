"""GGUF files: what goes in comes back, the type decides what is rounded, and a damaged file is one sentence."""

import contextlib
import dataclasses
import importlib
import json
import struct
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_linear.base.errors import CheckpointError, ConfigError
from kimi_linear.causal_lm import KimiLinearForCausalLM, load_model
from kimi_linear.checkpoint.gguf.export import export_gguf
from kimi_linear.checkpoint.relayout import export_release
from kimi_linear.models.kimi_linear.presets import preset
from kimi_linear.models.kimi_linear.release_config import to_release_config
from kimi_linear.nn.ffn import MoEConfig
from support.awkward import AWKWARD, build, lively_model
from support.engines import for_llama, with_parts

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'kimi-linear[gguf]'")


def read(path):
    """Every tensor as the package gguf reads it: its type and its bytes."""
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}


def metadata(path, key):
    return gguf.GGUFReader(path).fields[key].contents()


def save(model, directory):
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small model whose every matrix has rows of whole blocks of 32, and its directory."""
    parts = AWKWARD["wide-keys"].blocks
    config = build(
        dataclasses.replace(parts["k"].mixer, num_heads=1),
        parts["M"].mixer,
        MoEConfig(num_experts=3, top_k=2, intermediate_size=32, scaling=2.446),
        *(64, "kM"),
        vocab_size=40,
        hidden_size=32,
        norm_eps=1e-6,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = lively_model("odd-heads", config)
    return model, save(model, tmp_path_factory.mktemp("small") / "model")


@pytest.fixture
def written(small, tmp_path):
    """The small model as a GGUF file in float32."""
    export_gguf(small[1], tmp_path / "model.gguf", "f32")
    return tmp_path / "model.gguf"


def assert_comes_back(loaded, model):
    tensors = model.state_dict()
    assert loaded.state_dict().keys() == tensors.keys()
    for name, tensor in loaded.state_dict().items():
        expected = tensors[name].to(tensor.dtype)
        if name.endswith("A_log"):
            assert ((tensor - expected).abs() <= 2**-24 + expected.abs() * 2**-24).all(), name
        else:
            assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("type", ["f32", "bf16"])
@pytest.mark.parametrize("name", AWKWARD)
def test_a_model_comes_back(tmp_path, name, type):
    config = for_llama(AWKWARD[name])
    model = lively_model(name, config)
    model = model.bfloat16() if type == "bf16" else model
    export_gguf(save(model, tmp_path / "model"), tmp_path / "model.gguf", type)
    loaded = load_model(tmp_path / "model.gguf")
    assert loaded.model.embed_tokens.weight.dtype == {"f32": torch.float32, "bf16": torch.bfloat16}[type]
    assert to_release_config(loaded.config) == to_release_config(config)
    assert not loaded.training
    assert_comes_back(loaded, model)


def test_decay_rates_come_back_within_a_rounding_and_then_stay(small, tmp_path):
    """A_log to -exp to A_log moves by 2**-24 and half a step at most; what came back goes in and out unchanged."""
    model = KimiLinearForCausalLM(
        with_parts(
            with_parts(small[0].config, type(small[0].config.layer_blocks[0].mixer), num_heads=1000),
            type(small[0].config.layer_blocks[1].mixer),
            num_heads=1000,
        )
    )
    decays = model.model.layers[0].self_attn.A_log
    with torch.no_grad():
        decays.copy_(torch.empty_like(decays).uniform_(-5, 5, generator=torch.Generator().manual_seed(3)))
    export_gguf(save(model, tmp_path / "model"), tmp_path / "a.gguf", "f32")
    stored = np.frombuffer(read(tmp_path / "a.gguf")["blk.0.ssm_a"][1], np.float32)
    assert np.array_equal(stored, (-decays.detach().double().exp()).float().numpy())
    back = load_model(tmp_path / "a.gguf")
    assert_comes_back(back, model)
    export_gguf(save(back, tmp_path / "back"), tmp_path / "b.gguf", "f32")
    assert read(tmp_path / "b.gguf") == read(tmp_path / "a.gguf")
    again = load_model(tmp_path / "b.gguf")
    assert torch.equal(again.model.layers[0].self_attn.A_log, back.model.layers[0].self_attn.A_log)


@pytest.mark.parametrize("type", ["q8_0", "q4_0"])
def test_integer_types_come_back_as_what_the_package_gguf_decodes(small, tmp_path, type):
    path = tmp_path / "model.gguf"
    done = export_gguf(small[1], path, type)
    assert done.widened == ()
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    loaded = load_model(path)
    state = {name: tensor.numpy() for name, tensor in loaded.state_dict().items()}
    layer = "model.layers."
    pairs = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output.weight": state["lm_head.weight"],
        "blk.0.attn_q.weight": state[f"{layer}0.self_attn.q_proj.weight"],
        "blk.0.ffn_down.weight": state[f"{layer}0.mlp.down_proj.weight"],
        "blk.1.ffn_gate_exps.weight": state[f"{layer}1.mlp.experts.w1"],
        "blk.1.ffn_down_exps.weight": state[f"{layer}1.mlp.experts.w2"],
        "blk.1.ffn_up_exps.weight": state[f"{layer}1.mlp.experts.w3"],
        "blk.1.attn_k_b.weight": state[f"{layer}1.self_attn.kv_b_proj.weight"]
        .reshape(1, 64, 64)[:, :32]
        .transpose(0, 2, 1),
        "blk.1.attn_v_b.weight": state[f"{layer}1.self_attn.kv_b_proj.weight"].reshape(1, 64, 64)[:, 32:],
    }
    for name, found in pairs.items():
        assert np.array_equal(found, tensors[name]), name
    original = small[0].state_dict()
    step = {"q8_0": 2**-7, "q4_0": 2**-2}[type]
    for name, tensor in loaded.state_dict().items():
        exact = tensor.dim() == 1 or "conv1d" in name or name.endswith("gate.weight")
        limit = 1e-6 if exact else step * original[name].abs().max()
        assert (tensor - original[name]).abs().max() <= limit, name


@pytest.mark.parametrize("type", ["f32", "bf16", "q8_0"])
def test_writing_what_was_read_changes_no_byte(small, tmp_path, type):
    first, second, third = (tmp_path / f"{n}.gguf" for n in (1, 2, 3))
    export_gguf(small[1], first, type)
    export_gguf(save(load_model(first, dtype="float32"), tmp_path / "back"), second, type)
    export_gguf(first, third, type)
    assert read(first) == read(second) == read(third)


def test_a_gguf_file_becomes_a_release_directory(small, tmp_path):
    export_gguf(small[1], tmp_path / "model.gguf", "q8_0")
    export_release(tmp_path / "model.gguf", tmp_path / "release", dtype="float32")
    loaded, expected = load_model(tmp_path / "release"), load_model(tmp_path / "model.gguf")
    assert loaded.config == expected.config
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_every_tensor_is_one_that_the_package_gguf_knows(tmp_path):
    """By its own table of this architecture's names; and types are float32 where llama.cpp wants that."""
    name = "two-dense"
    export_gguf(save(lively_model(name), tmp_path / "model"), tmp_path / "model.gguf", "bf16")
    known = [gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.KIMI_LINEAR]]
    found = read(tmp_path / "model.gguf")
    for tensor in found:
        stem = tensor.removesuffix(".weight").removesuffix(".bias")
        block = stem.split(".")[1] if stem.startswith("blk.") else None
        assert stem in {text.format(bid=block) for text in known}, tensor
    wide = {tensor.split(".", 2)[-1] for tensor, (kind, _) in found.items() if kind == "F32" and "blk" in tensor}
    vectors = {"attn_norm.weight", "ffn_norm.weight", "attn_kv_a_norm.weight", "ssm_norm.weight", "ssm_dt.bias"}
    convolutions = {f"ssm_conv1d_{letter}.weight" for letter in "qkv"}
    assert wide == vectors | convolutions | {"ssm_a", "ffn_gate_inp.weight", "exp_probs_b.bias"}
    assert {kind for kind, _ in found.values()} == {"F32", "BF16"}
    # The head of tied embeddings is written too, for llama.cpp asks for it.
    assert found["output.weight"] == found["token_embd.weight"]


def test_rows_of_no_whole_blocks_stay_float32_and_are_named(tmp_path):
    name = "released-order"
    model = lively_model(name).float()
    done = export_gguf(save(model, tmp_path / "model"), tmp_path / "model.gguf", "q8_0")
    found = read(tmp_path / "model.gguf")
    assert "token_embd.weight" in done.widened
    assert all(found[tensor][0] == "F32" for tensor in done.widened)
    # Rows of 32 are whole blocks.
    assert found["blk.0.attn_output.weight"][0] == "Q8_0"
    loaded = load_model(tmp_path / "model.gguf")
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_pieces_do_not_change_the_file(small, tmp_path, monkeypatch):
    export_gguf(small[1], tmp_path / "whole.gguf", "q8_0")
    monkeypatch.setattr("kimi_linear.checkpoint.gguf.export._CHUNK", 5 * 32)
    export_gguf(small[1], tmp_path / "cut.gguf", "q8_0")
    assert (tmp_path / "cut.gguf").read_bytes()[2048:] == (tmp_path / "whole.gguf").read_bytes()[2048:]
    assert read(tmp_path / "cut.gguf") == read(tmp_path / "whole.gguf")


def test_special_tokens_come_back_and_end_texts(small, tmp_path):
    directory = tmp_path / "model"
    small[0].save_pretrained(directory)
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 7, 9]}')
    export_gguf(directory, tmp_path / "model.gguf", "f32")
    loaded = load_model(tmp_path / "model.gguf")
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id, loaded.config.pad_token_id) == (1, 2, 0)
    assert loaded.end_token_ids == (2, 7, 9)


def tokenizer_json(**changes):
    """A byte-level tokenizer of five tokens, one of them merged, and two special ones."""
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    added = [
        {"id": 3, "content": "<|end|>", "special": True},
        {"id": 5, "content": "<tool>", "special": False},
        {"id": 900, "content": "<|reserved|>", "special": True},
    ]
    whole = {"model": model, "added_tokens": added, "pre_tokenizer": {"type": "ByteLevel", "use_regex": True}}
    return {**whole, **changes}


HAN = {"type": "Split", "pattern": {"Regex": r"[\p{Han}]+|\p{N}{1,3}"}, "behavior": "Isolated"}
RELEASED = {"type": "Sequence", "pretokenizers": [HAN, {"type": "ByteLevel", "use_regex": False}]}


def with_tokenizer(small, tmp_path, given):
    directory = save(small[0], tmp_path / "model")
    (directory / "tokenizer.json").write_text(json.dumps(given))
    return directory


@pytest.mark.parametrize(("cut", "pre"), [(None, "gpt-2"), (RELEASED, "kimi-k2")])
def test_the_tokenizer_goes_into_the_file(small, tmp_path, cut, pre):
    given = tokenizer_json() if cut is None else tokenizer_json(pre_tokenizer=cut)
    directory = with_tokenizer(small, tmp_path, given)
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    path = tmp_path / "model.gguf"
    assert export_gguf(directory, path, "f32").has_tokenizer
    tokens, types = metadata(path, "tokenizer.ggml.tokens"), metadata(path, "tokenizer.ggml.token_type")
    assert len(tokens) == len(types) == 40
    assert tokens[:6] == ["a", "b", "ab", "<|end|>", "[UNUSED4]", "<tool>"]
    kinds = gguf.TokenType
    assert types[:6] == [kinds.NORMAL] * 3 + [kinds.CONTROL, kinds.UNUSED, kinds.USER_DEFINED]
    assert metadata(path, "tokenizer.ggml.merges") == ["a b"]
    assert metadata(path, "tokenizer.ggml.pre") == pre
    assert metadata(path, "tokenizer.ggml.eos_token_id") == 2
    assert metadata(path, "tokenizer.chat_template") == "{{ messages }}"
    assert to_release_config(load_model(path).config) == to_release_config(small[0].config)


def test_without_a_tokenizer_tokens_are_numbers(small, tmp_path):
    assert not export_gguf(small[1], tmp_path / "model.gguf", "f32").has_tokenizer
    assert metadata(tmp_path / "model.gguf", "tokenizer.ggml.tokens") == [f"[{n}]" for n in range(40)]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (tokenizer_json(pre_tokenizer={"type": "Whitespace"}), r"it cuts text by \['Whitespace'\]"),
        (tokenizer_json(pre_tokenizer=None), r"it cuts text by \[\]"),
        (tokenizer_json(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}), "puts a space before"),
        (tokenizer_json(model={"type": "Unigram"}), "its model is 'Unigram'"),
        (tokenizer_json(normalizer={"type": "NFC"}), "normalises text"),
        (tokenizer_json(model={"type": "BPE", "vocab": {"a": 40}, "merges": []}), "token 'a' has id 40"),
        ({"model": {"type": "BPE"}}, "not a tokenizer.json of the usual form"),
        ({}, "not a tokenizer.json of the usual form"),
    ],
)
def test_a_tokenizer_that_gguf_has_no_place_for_is_refused(small, tmp_path, given, sentence):
    directory = with_tokenizer(small, tmp_path, given)
    with pytest.raises(CheckpointError, match=sentence):
        export_gguf(directory, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_a_damaged_tiktoken_file_is_refused(small, tmp_path):
    directory = save(small[0], tmp_path / "model")
    (directory / "tiktoken.model").write_text("YQ== 0")
    with pytest.raises(CheckpointError, match=r"tiktoken.model: 255 of the 256 bytes"):
        export_gguf(directory, tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (AWKWARD["odd-heads"], "3 heads of Kimi Delta Attention and 5 of latent attention"),
        (with_parts(preset("tiny"), MoEConfig, renormalize=False), "weights that are not renormalised"),
        (with_parts(preset("tiny"), MoEConfig, num_shared_experts=0), "no shared expert"),
        (preset("tiny-mla"), "no layer with Kimi Delta Attention"),
        (preset("tiny-gdn"), "kind 'gdn'"),
    ],
)
def test_models_that_llama_cannot_run_are_refused(tmp_path, config, sentence):
    KimiLinearForCausalLM(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=sentence):
        export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_an_unknown_type_names_the_known_ones(small, tmp_path):
    with pytest.raises(ConfigError, match="q8_0"):
        export_gguf(small[1], tmp_path / "model.gguf", "q8")  # type: ignore[arg-type]


def test_without_the_package_one_sentence_says_what_to_install(small, written, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError):
        importlib.import_module("gguf")
    for call in (lambda: export_gguf(small[1], tmp_path / "a.gguf"), lambda: load_model(written)):
        with pytest.raises(CheckpointError, match=r"pip install 'kimi-linear\[gguf\]'"):
            call()


def test_a_failed_export_leaves_the_old_file(small, written, monkeypatch):
    before = written.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kimi_linear.checkpoint.gguf.export._converted", fail)
    with pytest.raises(CheckpointError, match="No space left on device"):
        export_gguf(small[1], written)
    assert written.read_bytes() == before
    assert [file.name for file in written.parent.iterdir()] == [written.name]


def test_a_directory_is_no_gguf_file(small, tmp_path):
    with pytest.raises(CheckpointError, match=r"it is a directory; give the name of a \.gguf file"):
        export_gguf(small[1], tmp_path)


def edited(path, old, new):
    """Replace bytes that occur once."""
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    return path


def entry(key, kind, value):
    """A metadata entry as the file has it."""
    return (
        struct.pack("<Q", len(key))
        + key.encode()
        + struct.pack("<I", {"I": 4, "f": 6}[kind])
        + struct.pack(f"<{kind}", value)
    )


def description(name, *shape):
    """A tensor's name and sizes as the file has them, fastest axis first."""
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (b"GGUF", b"GGML", "does not begin with GGUF"),
        (b"GGUF\x03", b"GGUF\x04", "version 4, expected 2 or 3"),
        (
            b"kimi-linear" + struct.pack("<Q", 12),
            b"kimi-squared"[:11] + struct.pack("<Q", 12),
            "architecture 'kimi-square",
        ),
        (
            b"blk.0.attn_q.weight",
            b"blk.0.attn_x.weight",
            r"1 missing \(blk.0.attn_q.weight\); 1 unexpected \(blk.0.attn_x",
        ),
        (
            description("blk.0.ffn_up.weight", 32, 64),
            description("blk.0.ffn_up.weight", 64, 32),
            r"1 of another shape \(blk.0.ffn_up.weight \[32, 64\] instead of \[64, 32\]\)",
        ),
        (
            description("blk.0.ffn_up.weight", 32, 64),
            description("blk.0.ffn_up.weight", 2**40, 64),
            "ends inside tensor blk.0.ffn_up.weight",
        ),
        (
            description("blk.0.ffn_up.weight", 32, 64),
            description("blk.0.ffn_up.weight", 32, 0),
            r"blk.0.ffn_up.weight \[0, 32\] .* not made of whole, aligned blocks",
        ),
        (
            description("blk.0.ffn_up.weight", 32, 64),
            description("blk.0.ffn_up.weight", 32, 65),
            "overlaps the one before it",
        ),
        (
            entry("kimi-linear.block_count", "I", 2),
            entry("kimi-linear.block_count", "I", 2**31),
            "2147483648 layers, and it holds",
        ),
        (
            entry("kimi-linear.block_count", "I", 2),
            entry("kimi-linear.block_count", "I", 3),
            r"attention.head_count_kv = \[0, 1\], expected 3 numbers",
        ),
        (
            entry("kimi-linear.expert_count", "I", 3),
            entry("kimi-linear.expert_count", "I", 2**31),
            "2147483648 experts, its tensors 3",
        ),
        (
            entry("kimi-linear.kda.head_dim", "I", 32),
            entry("kimi-linear.kda.head_dix", "I", 32),
            "kda.head_dim = None, expected a whole number",
        ),
        (
            entry("kimi-linear.expert_used_count", "I", 2),
            entry("kimi-linear.expert_used_count", "I", 4),
            "makes no model: .*top_k is 4",
        ),
        (
            entry("kimi-linear.expert_weights_scale", "f", 2.446),
            entry("kimi-linear.expert_weights_scale", "f", float("nan")),
            "expert_weights_scale = nan, expected a number",
        ),
        (
            b"layer_norm_rms_epsilon",
            b"layer_norm_rms_epsilox",
            "layer_norm_rms_epsilon = None, expected a number",
        ),
        (
            entry("kimi-linear.expert_gating_func", "I", 2),
            entry("kimi-linear.expert_gating_func", "I", 3),
            "activation is 'unknown'",
        ),
    ],
)
def test_a_damaged_file_is_one_sentence(written, old, new, sentence):
    edited(written, old, new)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        load_model(written)
    assert str(caught.value).startswith(f"{written}: ")


def test_counts_beyond_the_file_are_refused_before_they_are_walked(written):
    data = bytearray(written.read_bytes())
    data[8:24] = struct.pack("<QQ", 2**60, 2**60)
    written.write_bytes(data)
    with pytest.raises(CheckpointError, match="claims 1152921504606846976 tensors"):
        load_model(written)


def test_decay_rates_that_are_not_below_zero_are_refused(written):
    tensor = next(t for t in gguf.GGUFReader(written).tensors if t.name == "blk.0.ssm_a")
    data = bytearray(written.read_bytes())
    data[tensor.data_offset : tensor.data_offset + 4] = struct.pack("<f", 0.5)
    written.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"blk.0.ssm_a holds a decay rate that is not below zero"):
        load_model(written)


def test_a_file_cut_off_anywhere_is_refused(written):
    data = written.read_bytes()
    for size in [*range(0, len(data), 997), len(data) - 33]:
        written.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"ends inside|begin with"):
            load_model(written)


def test_other_files_are_refused_by_name(tmp_path):
    (tmp_path / "model.ggml").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"is a file, expected the directory .* or a \.gguf file"):
        load_model(tmp_path / "model.ggml")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_does_anything_but_refuse_or_load(written, data):
    """Bytes changed, a run overwritten, the end cut off; most of it in the header, where it matters."""
    original = written.with_suffix(".original")
    if not original.exists():
        original.write_bytes(written.read_bytes())
    content = bytearray(original.read_bytes())
    header = content.index(b"output_norm.weight") + 200
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, header) | st.integers(0, len(content) - 1))
        damage = data.draw(st.binary(min_size=1, max_size=8))
        content[where : where + len(damage)] = damage
    cut = data.draw(st.none() | st.integers(0, len(content)))
    written.write_bytes(content[:cut])
    # Anything else that is raised, a warning included, fails.
    with contextlib.suppress(CheckpointError):
        load_model(written)
