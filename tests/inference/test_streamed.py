"""A model that reads its weights layer by layer is the loaded model, and holds no more than it says."""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimi_linear import KimiLinearForCausalLM, load_model, preset
from kimi_linear.base.errors import CheckpointError, ConfigError, DtypeError
from kimi_linear.base.numerics import relative_error, tolerance
from kimi_linear.checkpoint import mapped
from kimi_linear.inference.resident import FIXED
from kimi_linear.inference.streamed import StreamedModel
from kimi_linear.models.kimi_linear.keys import release_bytes
from kimi_linear.models.kimi_linear.model import KimiLinearLM
from support.awkward import AWKWARD, lively_model, prompt
from support.source_tree import ROOT

# Also a model of our own type, whose mixers have other states.
NAMES = [*AWKWARD, "tiny-gdn"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories of the models, written once."""
    found = {}

    def directory(name):
        if name not in found:
            draw = torch.Generator().manual_seed(0)
            model = lively_model(name) if name in AWKWARD else KimiLinearForCausalLM(preset(name), generator=draw)
            found[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(found[name], max_shard_size="100KB")
        return found[name]

    return directory


def prompts(model, rows=2, length=14):
    draw = torch.Generator().manual_seed(3)
    return torch.randint(3, model.config.vocab_size, (rows, length), generator=draw)


def logits_of(model, ids):
    """Return what a model says of a batch: at once, in chunks with a cache, token by token, and padded on the left."""
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    cache, padded = model.new_cache(len(ids)), model.new_cache(len(ids))
    with torch.no_grad():
        found = [model(ids).logits, *(model(part, cache=cache).logits for part in ids[:, :10].split(4, dim=1))]
        found += [model(ids[:, t : t + 1], cache=cache, last_only=True).logits for t in range(10, ids.shape[1])]
        found.append(model(ids, cache=padded, attention_mask=mask, last_only=True).logits)
        found.append(model(ids[:, :1], cache=padded, last_only=True).logits)
    return torch.cat([logits.flatten(0, 1) for logits in found])


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_the_loaded_model_says(saved, name):
    """Up to rounding: the experts' parts are added in another order, and the head is a product of another shape."""
    loaded = load_model(saved(name), dtype="float32")
    streamed = load_model(saved(name), dtype="float32", stream_weights=True)
    ids = prompts(loaded)
    assert relative_error(logits_of(streamed, ids), logits_of(loaded, ids)) < tolerance("float32").output
    options = {"max_new_tokens": 4, "temperature": 0.0, "prefill_chunk": 8}
    rows = [ids[0].tolist(), ids[1, :5].tolist()]
    assert torch.equal(streamed.generate(rows, **options), loaded.generate(rows, **options))


@pytest.mark.parametrize("name", AWKWARD)
def test_in_the_stored_dtype_it_is_as_near_to_the_exact_result(saved, name):
    """In half precision each expert's part is rounded before it is added, so results differ by such roundings."""
    exact, loaded = load_model(saved(name), dtype="float64"), load_model(saved(name))
    streamed = load_model(saved(name), stream_weights=True)
    ids = prompt(name)
    with torch.no_grad():
        error, usual = (relative_error(m(ids).logits, exact(ids).logits) for m in (streamed, loaded))
    assert streamed(ids).logits.dtype == loaded(ids).logits.dtype
    assert error <= 1.5 * usual


def test_parameters_that_need_float32_are_computed_with_in_float32(saved, monkeypatch):
    """As when loading: rates, biases and selection biases are never narrowed, and widen with the model."""
    for dtype, wide in ((None, torch.float32), ("float64", torch.float64)):
        streamed = load_model(saved("first-mla"), dtype=dtype, stream_weights=True)
        read = streamed.streamed._read("model.layers.1", streamed.model.layers[1])
        found = {name.split(".")[-1]: tensor.dtype for name, tensor in read.items()}
        assert {found[name] for name in ("A_log", "dt_bias", "e_score_correction_bias")} == {wide}
        assert read["self_attn.q_proj.weight"].dtype == (torch.bfloat16 if dtype is None else wide)


def chosen(model, ids):
    """Return the experts that a loaded model's tokens choose, by layer."""
    found = {}
    for index, block in enumerate(model.model.blocks()):
        if hasattr(block.mlp, "gate"):
            keep = lambda _, __, out, index=index: found.update({index: set(out[1].flatten().tolist())})  # noqa: E731
            block.mlp.gate.register_forward_hook(keep)
    with torch.no_grad():
        model(ids)
    return found


def with_experts_of_nan(directory, target, experts):
    """Copy a model with the experts (layer, number) overwritten."""
    for path in directory.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    for path in target.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            place = re.search(r"layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.", name)
            if place is not None and (int(place[1]), int(place[2])) in experts:
                tensor.fill_(float("nan"))
        save_file(tensors, path)
    return load_model(target, stream_weights=True)


def test_an_expert_is_read_if_and_only_if_a_token_chose_it(saved, tmp_path):
    directory, ids = saved("two-dense"), torch.tensor([[5]])
    usual = load_model(directory, stream_weights=True)(ids).logits
    in_use = {(layer, e) for layer, picked in chosen(load_model(directory), ids).items() for e in picked}
    idle = {(layer, e) for layer, _ in in_use for e in range(16)} - in_use
    assert len(in_use) == 5 * 4
    for name, experts in (("idle", idle), ("one", {max(in_use)})):
        (tmp_path / name).mkdir()
        found = with_experts_of_nan(directory, tmp_path / name, experts)(ids).logits
        # A tensor that lies elsewhere in a file may change the last bits of a product.
        assert (relative_error(found, usual) < tolerance("float32").output) is (name == "idle")


def test_the_bytes_read_are_those_of_layers_head_rows_and_chosen_experts(saved):
    loaded, ids = load_model(saved("odd-heads")), torch.tensor([[7, 9, 7]])
    config = loaded.config
    streamed = load_model(saved("odd-heads"), stream_weights=True)
    parameters = {name: p.nbytes for name, p in loaded.named_parameters()}
    routed = {name: size for name, size in parameters.items() if ".experts." in name}
    experts = sum(
        len(picked) * sum(size for name, size in routed.items() if f"layers.{layer}." in name) // 5
        for layer, picked in chosen(loaded, ids).items()
    )
    rows = 2 * config.hidden_size * 4
    others = sum(parameters.values()) - sum(routed.values()) - parameters["model.embed_tokens.weight"]
    streamed(ids)
    assert streamed.streamed.bytes_read == others + experts + rows
    assert streamed.streamed.stored_bytes == sum(parameters.values())


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/maps")
def test_no_more_than_a_layer_an_expert_and_pages_are_mapped_and_nothing_stays(saved, monkeypatch):
    directory, seen = saved("two-dense"), []

    def mapped_bytes():
        lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(directory) in line]
        return sum(int(end, 16) - int(begin, 16) for begin, end in (line.split()[0].split("-") for line in lines))

    def watched(*arguments):
        window = map_window(*arguments)
        seen.append(mapped_bytes())
        return window

    map_window = mapped.map_window
    monkeypatch.setattr(mapped, "map_window", watched)
    streamed = load_model(directory, stream_weights=True)
    layers = [
        {
            name: p.nbytes // (16 if ".experts." in f".{name}" and p.dim() == 3 else 1)
            for name, p in b.named_parameters()
        }
        for b in streamed.model.blocks()
    ]
    streamed.generate([[5, 6, 7]], max_new_tokens=3, temperature=0.0)
    assert max(seen) <= max(sum(layer.values()) + 2 * 4096 * len(layer) for layer in layers)
    assert mapped_bytes() == 0


def test_the_bound_is_far_below_the_released_model():
    with torch.device("meta"):
        model = KimiLinearLM(preset("48b-a3b")).to(torch.bfloat16)
    streamed = StreamedModel.__new__(StreamedModel)
    streamed._model = model
    bound = streamed.resident_bound(1, 32, 64)
    layer = 2 * 103_219_872
    assert FIXED + layer < bound < 2**30 < release_bytes(model.config) // 90
    grown = [streamed.resident_bound(*sizes) for sizes in ((2, 32, 64), (1, 64, 64), (1, 32, 128))]
    assert all(one > bound for one in grown)
    # The cache of a long context: at least its own 8,064 bytes a token.
    assert streamed.resident_bound(1, 32, 10**6) > 8064 * 10**6


def test_generation_keeps_to_a_limit_on_address_space_and_to_the_promised_bound():
    """The process may map a third of the file, beside what the interpreter and torch map without a model."""
    script = ROOT / "benchmarks" / "bigger_than_memory.py"
    command = [sys.executable, str(script), "--small", "--threads", "1", "--tokens", "4"]
    environment = {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert re.search(r"promised bound on that +[\d.]+ GiB: kept", done.stdout)


def test_it_ends_at_the_tokens_of_the_generation_config(saved):
    streamed = load_model(saved("odd-heads"), stream_weights=True)
    assert streamed.end_token_ids == load_model(saved("odd-heads")).end_token_ids == (2,)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal_shows_layers_and_bytes(saved, monkeypatch):
    streamed = load_model(saved("odd-heads"), stream_weights=True)
    for stream, is_shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        streamed(torch.tensor([[1, 2, 3]]))
        assert (("4/4" in stream.getvalue()) and bool(re.search(r"\d+kB", stream.getvalue()))) is is_shown
    # One token a row is no wait; the tokens themselves are the progress.
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    streamed(torch.tensor([[1], [2]]))
    assert terminal.getvalue() == ""


@pytest.mark.parametrize(
    "use",
    [
        lambda model, path: model.train()(torch.tensor([[1]])),
        lambda model, path: model(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])),
        lambda model, path: model.prepare_for_inference("float32"),
        lambda model, path: model.save_pretrained(path / "copy"),
    ],
    ids=["training", "labels", "packing", "saving"],
)
def test_what_needs_the_weights_in_memory_is_refused(saved, tmp_path, use):
    streamed = load_model(saved("odd-heads"), stream_weights=True)
    with pytest.raises(ConfigError, match=r"reads its weights from .*; load it without stream_weights\.$"):
        use(streamed, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_options_that_do_not_go_together_are_refused(saved):
    for options in ({"weights": "int8"}, {"device": "meta"}):
        with pytest.raises(ConfigError, match="stream_weights runs stored weights on the CPU"):
            load_model(saved("odd-heads"), stream_weights=True, **options)
    with pytest.raises(DtypeError, match="dtype is 'int4'"):
        load_model(saved("odd-heads"), dtype="int4", stream_weights=True)


def test_a_damaged_file_is_refused_before_anything_runs(saved, tmp_path):
    for path in saved("odd-heads").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{shard.name} is not a whole safetensors file"):
        load_model(tmp_path, stream_weights=True)


def test_a_model_in_memory_streams_nothing():
    assert KimiLinearForCausalLM(preset("tiny")).streamed is None
