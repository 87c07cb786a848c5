"""A checkpoint broken in every way that the doctor knows: it is found, named for whom, and repaired in a copy."""

import base64
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from kimi_linear.base.errors import CheckpointError, ConfigError
from kimi_linear.causal_lm import KimiLinearForCausalLM, load_model
from kimi_linear.checkpoint.header import read_header
from kimi_linear.cli.main import app
from kimi_linear.models.kimi_linear.presets import preset
from kimi_linear.models.kimi_linear.release_config import to_release_config
from kimi_linear.nn.config import BlockConfig
from kimi_linear.recipes.checkup import Finding, check, check_values, gather, repair
from kimi_linear.recipes.inspect import inspect

INDEX = "model.safetensors.index.json"
CONFIG = dataclasses.replace(preset("tiny"), eos_token_id=2, bos_token_id=1)
TOKENIZER = {
    "added_tokens": [{"id": 2, "content": "<|im_end|>"}, {"id": 3, "content": "[EOS]"}],
    "model": {"type": "BPE", "vocab": {chr(97 + n): 10 + n for n in range(26)}, "merges": []},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with nothing to complain about, in several shards."""
    directory = tmp_path_factory.mktemp("whole") / "model"
    model = KimiLinearForCausalLM(CONFIG, generator=torch.Generator().manual_seed(0)).bfloat16()
    model.end_token_ids = (2, 3)
    model.save_pretrained(directory, max_shard_size="100KB")
    (directory / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


@pytest.fixture
def directory(whole: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    shutil.copytree(whole, tmp_path / "model")
    return tmp_path / "model"


def problems(directory: Path) -> list[Finding]:
    return [finding for finding in check(gather(directory)) if finding.severity != "ok"]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def edit(directory: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads((directory / name).read_text())
    change(value)
    (directory / name).write_text(json.dumps(value))


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def rename_tensors(directory: Path, old: str, new: str) -> None:
    """Rename in the shards and in the index, as another engine would have written them."""
    change_tensors(directory, lambda tensors: {name.replace(old, new): x for name, x in tensors.items()})


def change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Change the tensors of every shard, and write an index that fits."""
    where, size = {}, 0
    for path in shards(directory):
        tensors = change(load_file(path))
        save_file({name: x.contiguous() for name, x in tensors.items()}, path, {"format": "pt"})
        where |= dict.fromkeys(tensors, path.name)
        size += sum(x.nbytes for x in tensors.values())
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": where}))


def cast(directory: Path, ending: str, dtype: torch.dtype) -> None:
    change_tensors(directory, lambda found: {n: x.to(dtype) if n.endswith(ending) else x for n, x in found.items()})


def misalign(directory: Path) -> None:
    """Make the header of the first shard one byte longer, as a careless writer does."""
    raw = shards(directory)[0].read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].rstrip()
    header += b" " * (1 - (len(header) % 2))
    shards(directory)[0].write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


def rename_files(directory: Path) -> None:
    text = (directory / INDEX).read_text()
    for path in shards(directory):
        path.rename(path.with_name(path.name.replace("model-", "part-")))
    (directory / INDEX).write_text(text.replace("model-", "part-"))


def repeat_tensor(directory: Path, values: float | None = None) -> None:
    first, second, *_ = shards(directory)
    tensors, name = load_file(second), min(load_file(first))
    again = load_file(first)[name]
    save_file({**tensors, name: again if values is None else again + values}, second, {"format": "pt"})


def both_kinds_of_files(directory: Path) -> None:
    everything = {name: x for path in shards(directory) for name, x in load_file(path).items()}
    save_file(everything, directory / "model.safetensors", {"format": "pt"})


def index_where(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda directory: edit(directory, INDEX, change)


def config_where(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda directory: edit(directory, "config.json", change)


def resaved_by_transformers(given: dict[str, Any]) -> None:
    for key in ("linear_attn_config", "first_k_dense_replace", "rope_theta", "mla_use_nope"):
        del given[key]
    given |= {"linear_head_dim": 16, "linear_num_heads": 4, "linear_conv_kernel_dim": 4}


def point_to_code(directory: Path) -> None:
    config_where(lambda c: c.update(auto_map={"AutoConfig": "configuration_kimi.KimiLinearConfig"}))(directory)
    (directory / "configuration_kimi.py").write_text("raise SystemExit('remote code ran')\n")


def flatten(directory: Path) -> None:
    change_tensors(directory, lambda found: {n: x.flatten() if n.endswith("A_log") else x for n, x in found.items()})


def cut_latent_projection(directory: Path) -> None:
    """Store kv_b_proj in two parts, the keys' transposed, as mlx-lm does."""
    H, N, V, R = (getattr(CONFIG.blocks["mla"].mixer, name) for name in _MLA_SIZES)

    def change(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = "model.layers.3.self_attn.kv_b_proj.weight"
        if name not in found:
            return found
        keys, values = found.pop(name).view(H, N + V, R).split([N, V], dim=1)
        prefix = name.removesuffix("kv_b_proj.weight")
        return {**found, f"{prefix}embed_q.weight": keys.mT, f"{prefix}unembed_out.weight": values}

    change_tensors(directory, change)


_MLA_SIZES = ("num_heads", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank")


def bias_between_steps(directory: Path) -> None:
    def change(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: torch.full_like(x, 1.0).float() if n.endswith("correction_bias") else x for n, x in found.items()}

    change_tensors(directory, change)


# What is done to a checkpoint, the check that sees it, what it says, of what severity and for whom.
FIXABLE: dict[str, tuple[Callable[[Path], Any], str, str, str, str]] = {
    "dense layer named by transformers": (
        lambda d: rename_tensors(d, "layers.0.mlp.", "layers.0.block_sparse_moe."),
        *("layout", "3 tensors are in the layout of transformers", "error", "llama.cpp"),
    ),
    "all experts named by transformers": (
        lambda d: rename_tensors(d, "block_sparse_moe", "mlp"),
        *("layout", "in the layout of transformers", "error", "vLLM"),
    ),
    "layers named by mlx-lm": (
        lambda d: change_tensors(
            d,
            lambda found: {
                n.replace("_conv1d.weight", "_conv.conv.weight"): x.transpose(1, 2) if "_conv1d" in n else x
                for n, x in found.items()
            },
        ),
        *("layout", "9 tensors are in the layout of mlx-lm", "error", "transformers"),
    ),
    "latent projection in two": (
        cut_latent_projection,
        *("layout", "2 tensors are in the layout of mlx-lm", "error", "vLLM"),
    ),
    "flat A_log": (flatten, "layout", "3 tensors lack axes of size 1", "error", "transformers"),
    "decays in bfloat16": (
        lambda d: cast(d, ("A_log", "dt_bias"), torch.bfloat16),  # type: ignore[arg-type]
        *("dtypes", "6 decay parameters are stored below float32", "warning", "kimi-linear"),
    ),
    "router biases in float32": (
        bias_between_steps,
        *("dtypes", "3 router biases are F32 among weights of BF16", "warning", "transformers"),
    ),
    "re-saved configuration": (
        config_where(resaved_by_transformers),
        *("keys", "no linear_attn_config, no first_k_dense_replace, no mla_use_nope, no rope_theta", "error", "vLLM"),
    ),
    "alternate spelling": (
        config_where(lambda c: c.update(n_routed_experts=c.pop("num_experts"))),
        *("keys", "has no num_experts under the released names", "error", "SGLang"),
    ),
    "null instead of the lists": (
        config_where(lambda c: (resaved_by_transformers(c), c.update(linear_attn_config=None))),
        *("layers", "linear_attn_config is null", "error", "transformers"),
    ),
    "one list of two": (
        config_where(lambda c: c["linear_attn_config"].pop("full_attn_layers")),
        *("layers", "one of its two layer lists only", "error", "llama.cpp"),
    ),
    "a schedule to guess": (
        config_where(lambda c: (c.pop("layer_types"), c["linear_attn_config"].pop("full_attn_layers"))),
        *("layers", "transformers guesses another schedule", "error", "transformers"),
    ),
    "another dtype": (
        config_where(lambda c: c.update(dtype="float32")),
        *("keys", "says dtype float32 and the weights are bfloat16", "warning", "vLLM"),
    ),
    "remote code": (point_to_code, "config", "points to Python files", "warning", "transformers"),
    "no index": (lambda d: (d / INDEX).unlink(), "index", "weight files and no model.saf", "error", "transformers"),
    "index without a tensor": (
        index_where(lambda index: index["weight_map"].pop("lm_head.weight")),
        *("index", "does not name 1 tensors (lm_head.weight)", "error", "kimi-linear"),
    ),
    "index with a tensor elsewhere": (
        lambda d: edit(d, INDEX, lambda index: index["weight_map"].update({"lm_head.weight": shards(d)[0].name})),
        *("index", "looks in the wrong file for 1 tensors (lm_head.weight)", "error", "transformers"),
    ),
    "index with a tensor too many": (
        lambda d: edit(d, INDEX, lambda index: index["weight_map"].update(extra=shards(d)[0].name)),
        *("index", "looks in the wrong file for 1 tensors (extra)", "error", "transformers"),
    ),
    "index of another size": (
        index_where(lambda index: index["metadata"].update(total_size=1)),
        *("index", "total_size 1, the tensors have", "warning", "transformers"),
    ),
    "index without metadata": (
        index_where(lambda index: index.pop("metadata")),
        *("index", "total_size None", "warning", "transformers"),
    ),
    "broken index": (lambda d: (d / INDEX).write_text("{"), "index", "not valid JSON", "error", "vLLM"),
    "both kinds of files": (both_kinds_of_files, "index", "are both there", "error", "vLLM"),
    "a tensor twice": (repeat_tensor, "tensors", "in several files", "warning", "llama.cpp"),
    "a tensor of another network": (
        lambda d: change_tensors(d, lambda found: {**found, "model.extra.weight": torch.zeros(2)}),
        *("tensors", "have no use in this network (model.extra.weight)", "error", "vLLM"),
    ),
    "odd file names": (rename_files, "files", "files are not named as usual (part-00001-", "warning", "llama.cpp"),
    "misaligned tensors": (misalign, "files", "do not start at a multiple", "warning", "vLLM"),
    "a pickle": (lambda d: (d / "pytorch_model.bin").write_bytes(b"\x80"), "files", "pickle files", "warning", "vLLM"),
    "no generation_config": (
        lambda d: (d / "generation_config.json").unlink(),
        *("stopping", "engines stop at config.json's eos_token_id alone", "warning", "transformers"),
    ),
    "broken generation_config": (
        lambda d: (d / "generation_config.json").write_text("["),
        *("stopping", "not valid JSON", "error", "transformers"),
    ),
    "an end token that does not stop": (
        lambda d: edit(d, "generation_config.json", lambda g: g.update(eos_token_id=2)),
        *("stopping", "stops at [2], not at [3]", "warning", "SGLang"),
    ),
}


def test_a_saved_checkpoint_with_a_tokenizer_has_nothing_wrong(whole: Path) -> None:
    assert problems(whole) == []
    assert len(check(gather(whole))) == 11


@pytest.mark.parametrize("name", FIXABLE)
def test_what_can_be_repaired_is_found_and_repaired(directory: Path, whole: Path, tmp_path: Path, name: str) -> None:
    break_it, check_name, text, severity, engine = FIXABLE[name]
    break_it(directory)
    found = [finding for finding in problems(directory) if finding.check == check_name and text in finding.text]
    assert [(finding.severity, finding.fixable) for finding in found] == [(severity, True)], problems(directory)
    assert engine in found[0].affects
    assert found[0].text.endswith(".")
    before = contents(directory)
    result = repair(directory, tmp_path / "fixed")
    assert contents(directory) == before
    assert found[0] in result.fixed
    assert result.left == tuple(problems(tmp_path / "fixed")) == ()
    expected, model = load_model(whole).state_dict(), load_model(tmp_path / "fixed").state_dict()
    changed = {"router biases in float32": "correction_bias", "decays in bfloat16": ("A_log", "dt_bias")}.get(name, "-")
    assert [n for n in expected if not n.endswith(changed) and not torch.equal(expected[n], model[n])] == []


def all_linear(directory: Path) -> None:
    """A configuration of the released type whose layers are all linear."""

    def change(given: dict[str, Any]) -> None:
        given["linear_attn_config"] |= {"kda_layers": [1, 2, 3, 4], "full_attn_layers": []}
        given["layer_types"] = ["linear_attention"] * 4

    edit(directory, "config.json", change)


def reserved_ids(directory: Path) -> None:
    lines = [base64.b64encode(bytes([n])) + b" %d" % n for n in range(250)]
    (directory / "tiktoken.model").write_bytes(b"\n".join(lines))


# As above, for what no copy can mend, and whether one can be written at all.
NOT_FIXABLE: dict[str, tuple[Callable[[Path], Any], str, str, str, bool]] = {
    "Kimi-K3": (config_where(lambda c: c.update(attn_res_block_size=4)), "config", "over depth", "error", False),
    "no configuration": (lambda d: (d / "config.json").unlink(), "config", "has no config.json", "error", False),
    "unknown key": (config_where(lambda c: c.update(window=4)), "config", "not read: window", "warning", True),
    "all layers linear": (all_linear, "layers", "no layer attends", "warning", False),
    "a missing shard": (lambda d: shards(d)[-1].unlink(), "index", "names missing files", "error", False),
    "a missing number": (lambda d: shards(d)[1].unlink(), "files", "shards are missing: model-00002", "error", False),
    "a missing tensor": (
        lambda d: change_tensors(d, lambda found: {n: x for n, x in found.items() if n != "model.norm.weight"}),
        *("tensors", "1 missing (model.norm.weight)", "error", False),
    ),
    "half a file": (
        lambda d: shards(d)[0].write_bytes(shards(d)[0].read_bytes()[:-9]),
        *("files", "is not a whole safetensors file", "error", False),
    ),
    "no weights": (lambda d: [p.unlink() for p in shards(d)], "files", "no safetensors file", "error", False),
    "two different tensors": (
        lambda d: repeat_tensor(d, 1.0),
        *("tensors", "1 tensors are in several files with different values", "error", False),
    ),
    "mixed dtypes": (lambda d: cast(d, "q_proj.weight", torch.float16), "dtypes", "several dtypes", "warning", True),
    "no tokenizer": (
        lambda d: (d / "tokenizer.json").unlink(),
        *("tokenizer", "there is no tokenizer (tokenizer.json or tiktoken.model)", "warning", True),
    ),
    "broken tokenizer": (lambda d: (d / "tokenizer.json").write_text("{"), "tokenizer", "not valid", "error", True),
    "tokens beyond the embedding": (
        lambda d: edit(d, "tokenizer.json", lambda t: t["added_tokens"].append({"id": 256, "content": "[PAD]"})),
        *("tokenizer", "1 tokens lie beyond the 256 rows of the embedding, the last '[PAD]' 256", "error", True),
    ),
    "reserved ids beyond the embedding": (reserved_ids, "tokenizer", "252 ids beyond", "warning", True),
    "no chat template": (
        lambda d: (d / "chat_template.jinja").unlink(),
        *("chat", "there is no chat template", "warning", True),
    ),
    "another end token in the tokenizer": (
        lambda d: edit(d, "tokenizer_config.json", lambda t: t.update(eos_token={"content": "[EOS]"})),
        *("stopping", "config.json ends a text with [2], the tokenizer with 3", "warning", True),
    ),
}


@pytest.mark.parametrize("name", NOT_FIXABLE)
def test_what_cannot_be_repaired_is_found_and_stays(directory: Path, tmp_path: Path, name: str) -> None:
    break_it, check_name, text, severity, copies = NOT_FIXABLE[name]
    break_it(directory)
    found = [finding for finding in problems(directory) if finding.check == check_name and text in finding.text]
    assert [(finding.severity, finding.fixable) for finding in found] == [(severity, False)], problems(directory)
    if copies:
        assert any(text in finding.text for finding in repair(directory, tmp_path / "fixed").left)
        return
    with pytest.raises(CheckpointError):
        repair(directory, tmp_path / "fixed")
    assert not (tmp_path / "fixed").exists()


def test_a_router_bias_between_two_steps_stays_as_it_is(directory: Path, tmp_path: Path) -> None:
    change_tensors(
        directory,
        lambda found: {n: x.float() + 0.1001 if n.endswith("correction_bias") else x for n, x in found.items()},
    )
    result = repair(directory, tmp_path / "fixed")
    assert ["3 router biases are F32" in finding.text for finding in result.left] == [True]
    same = load_model(tmp_path / "fixed").state_dict()
    assert torch.equal(same["model.layers.1.mlp.gate.e_score_correction_bias"], torch.full((8,), 0.1001))


def test_a_model_without_experts_lacks_their_keys_for_some_engines_only(tmp_path: Path) -> None:
    config = dataclasses.replace(
        preset("tiny"),
        layers=("kda_dense", "mla"),
        blocks={
            "kda_dense": preset("tiny").blocks["kda_dense"],
            "mla": BlockConfig(mixer=preset("tiny").blocks["mla"].mixer, ffn=preset("tiny").blocks["kda_dense"].ffn),
        },
    )
    KimiLinearForCausalLM(config).save_pretrained(tmp_path / "model")
    assert {finding.check for finding in problems(tmp_path / "model")} == {"tokenizer", "chat"}
    for key in ("num_experts", "num_shared_experts", "moe_intermediate_size"):
        edit(tmp_path / "model", "config.json", lambda given, key=key: given.pop(key))
    found = [finding for finding in problems(tmp_path / "model") if finding.check == "keys"]
    assert [finding.affects for finding in found] == [("llama.cpp", "mlx-lm")]


def test_a_tied_output_head_is_stored_for_engines_that_never_tie(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, tie_embeddings=True)
    KimiLinearForCausalLM(config).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file({name: x for name, x in load_file(file).items() if name != "lm_head.weight"}, file)
    result = repair(tmp_path / "model", tmp_path / "fixed")
    assert ["transformers never ties" in finding.text for finding in result.fixed] == [True]
    assert {finding.check for finding in result.left} == {"tokenizer", "chat"}
    assert [finding.severity for finding in check_values(gather(tmp_path / "fixed"))] == ["ok"]
    tied, fixed = load_model(tmp_path / "model"), load_model(tmp_path / "fixed")
    assert fixed.config == config
    assert "lm_head.weight" in load_file(tmp_path / "fixed" / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(tied(torch.arange(9)[None]).logits, fixed(torch.arange(9)[None]).logits)


def test_a_gguf_file_is_no_directory_to_look_at(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for look in (gather, inspect):
        with pytest.raises(CheckpointError, match=r"model\.gguf is a GGUF file, expected a directory"):
            look(tmp_path / "model.gguf")


def test_a_model_of_our_own_type_is_for_this_package(tmp_path: Path) -> None:
    KimiLinearForCausalLM(preset("tiny-gdn")).save_pretrained(tmp_path / "model")
    config = next(finding for finding in problems(tmp_path / "model") if finding.check == "config")
    assert (config.severity, config.affects) == ("warning", ("transformers", "vLLM", "SGLang", "llama.cpp", "mlx-lm"))
    repair(tmp_path / "model", tmp_path / "copy")
    assert load_model(tmp_path / "copy").config == preset("tiny-gdn")


@pytest.mark.parametrize("variant", ["tiny-mla", "softmax", "heads"])
def test_what_one_engine_cannot_run_is_said(tmp_path: Path, variant: str) -> None:
    config = preset("tiny-mla" if variant == "tiny-mla" else "tiny")
    blocks = {
        name: BlockConfig(
            mixer=dataclasses.replace(b.mixer, num_heads=2)
            if variant == "heads" and b.mixer.kind == "mla"
            else b.mixer,
            ffn=dataclasses.replace(b.ffn, activation="softmax")
            if variant == "softmax" and b.ffn.kind == "moe"
            else b.ffn,
        )
        for name, b in config.blocks.items()
    }
    KimiLinearForCausalLM(dataclasses.replace(config, blocks=blocks)).save_pretrained(tmp_path / "model")
    text, engine = {
        "tiny-mla": ("no layer is linear", "mlx-lm"),
        "softmax": ("scores with a softmax", "transformers"),
        "heads": ("different numbers of heads ([2, 4])", "llama.cpp"),
    }[variant]
    assert [(text in f.text, f.affects) for f in problems(tmp_path / "model") if f.check == "layers"] == [
        (True, (engine,))
    ]


def test_the_released_configuration_lacks_nothing(tmp_path: Path) -> None:
    """Neither as published, without layer_types, nor as we write it; the weights are elsewhere."""
    written = to_release_config(preset("48b-a3b"))
    published = {key: value for key, value in written.items() if key not in ("layer_types", "mlp_layer_types")}
    for given in (written, published):
        (tmp_path / "config.json").write_text(json.dumps(given))
        found = {finding.check: finding.severity for finding in check(gather(tmp_path))}
        assert (found["config"], found["keys"], found["layers"]) == ("ok", "ok", "ok")


def test_reading_the_values(directory: Path) -> None:
    assert [finding.severity for finding in check_values(gather(directory))] == ["ok"]

    def change(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name, tensor in found.items():
            if name == "model.layers.1.self_attn.q_proj.weight":
                tensor.zero_()
            if name == "model.layers.2.self_attn.dt_bias":
                tensor[3] = torch.inf
            if name == "lm_head.weight":
                tensor[5, 5] = torch.nan
            if name.startswith("model.layers.1.block_sparse_moe.experts.0.w"):
                tensor.copy_(torch.arange(tensor.numel()).view_as(tensor))
        return found

    change_tensors(directory, change)
    read: list[int] = []
    found = check_values(gather(directory), read.append)
    assert [finding.severity for finding in found] == ["error", "warning", "warning"]
    assert "2 tensors hold NaN or infinity (lm_head.weight, model.layers.2.self_attn.dt_bias)" in found[0].text
    assert "1 matrices are all zero (model.layers.1.self_attn.q_proj.weight)" in found[1].text
    same = "experts.0.w1.weight = model.layers.1.block_sparse_moe.experts.0.w3.weight"
    assert "1 matrices are there under several names" in found[2].text
    assert same in found[2].text
    assert sum(read) == sum(
        x.numel() * x.element_size() for path in shards(directory) for x in load_file(path).values()
    )


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_the_exit_code_and_the_table(directory: Path, tmp_path: Path) -> None:
    assert run(str(directory), "--values").exit_code == 0
    rename_tensors(directory, "layers.0.mlp.", "layers.0.block_sparse_moe.")
    (directory / "chat_template.jinja").unlink()
    done = run(str(directory))
    assert done.exit_code == 1
    assert "error   layout    3 tensors are in the layout of transformers" in done.stdout
    assert "for vLLM, SGLang, llama.cpp, mlx-lm; to do: save it in the release's layout" in done.stdout
    fixed = run(str(directory), "--fix", str(tmp_path / "fixed"))
    assert fixed.exit_code == 0
    assert "1 findings fixed, left are:\nwarning chat" in fixed.stdout
    again = run(str(tmp_path / "fixed"), "--json")
    assert again.exit_code == 0
    found = json.loads(again.stdout)["findings"]
    assert [entry["check"] for entry in found if entry["severity"] != "ok"] == ["chat"]


def test_json_of_a_repair(directory: Path, tmp_path: Path) -> None:
    (directory / INDEX).unlink()
    (directory / "tokenizer.json").unlink()
    done = run(str(directory), "--fix", str(tmp_path / "fixed"), "--json", "--values")
    found = json.loads(done.stdout)
    assert found["copy"] == str(tmp_path / "fixed")
    assert [entry["check"] for entry in found["fixed"]] == ["index"]
    assert [entry["check"] for entry in found["left"]] == ["tokenizer", "values"]
    assert len(read_header(tmp_path / "fixed" / "model.safetensors")) == len(gather(directory).stored)


def test_without_a_checkpoint_it_is_the_installation() -> None:
    assert "torch" in run().stdout
    assert {"subject", "good", "text"} == set(json.loads(run("--json").stdout)[0])
    for option in (["--values"], ["--fix", "somewhere"]):
        assert isinstance(run(*option).exception, ConfigError)


def test_a_copy_goes_to_a_new_directory_only(directory: Path, tmp_path: Path) -> None:
    before = contents(directory)
    for target in (directory, directory / "inside"):
        with pytest.raises(CheckpointError, match="is the checkpoint itself or inside it"):
            repair(directory, target)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(CheckpointError, match="is there already; give a new or empty directory"):
        repair(directory, tmp_path / "full")
    assert contents(directory) == before
    (tmp_path / "empty").mkdir()
    repair(directory, tmp_path / "empty", max_shard_size="50KB")
    assert len(shards(tmp_path / "empty")) > 3


def test_a_copy_has_files_of_its_own(directory: Path, tmp_path: Path) -> None:
    (directory / "LICENSE").write_text("the licence")
    repair(directory, tmp_path / "fixed")
    (tmp_path / "fixed" / "LICENSE").write_text("another")
    assert (directory / "LICENSE").read_text() == "the licence"
