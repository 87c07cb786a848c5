"""What inspecting a checkpoint says: of a whole one, of other layouts, and of a broken one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from kimi_linear.causal_lm import KimiLinearForCausalLM
from kimi_linear.cli.main import app
from kimi_linear.models.kimi_linear.keys import release_bytes, release_tensors
from kimi_linear.models.kimi_linear.presets import preset
from kimi_linear.recipes.inspect import Inspection, inspect, report


@pytest.fixture
def directory(tmp_path):
    KimiLinearForCausalLM(preset("tiny")).bfloat16().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(directory, change_tensors):
    path = directory / "model.safetensors"
    save_file(change_tensors(load_file(path)), path)


def test_a_whole_checkpoint(directory):
    (directory / "tokenizer.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("")
    found = inspect(directory)
    assert (found.config, found.model_type) == (preset("tiny"), "kimi_linear")
    assert found.tensors == len(release_tensors(preset("tiny")))
    assert sum(found.bytes_by_dtype.values()) == release_bytes(preset("tiny"))
    assert found.bytes_by_dtype.keys() == {"BF16", "F32"}
    assert (found.layouts, found.problem) == (("release",), "")
    assert found.schedule == "kKKM"
    assert found.odd == ()
    assert "loads       yes" in report(found)


def test_the_released_schedule_is_drawn():
    """As the specification has it: full attention in layers 4, 8, ..., 24 and 27, one dense layer."""
    found = Inspection(Path(), preset("48b-a3b"), "", 0, {}, (), "", ())
    assert found.schedule == "kKKM " + "KKKM " * 5 + "KKM"


def test_other_layouts_and_rounded_decays_are_odd(directory):
    def other(tensors):
        found = {n.replace("0.mlp.", "0.block_sparse_moe."): x for n, x in tensors.items()}
        return {n: x.bfloat16() if n.endswith("A_log") else x for n, x in found.items()}

    change(directory, other)
    found = inspect(directory)
    assert found.layouts == ("release", "transformers")
    text = "\n".join(found.odd)
    assert "3 tensors are in the layout of transformers (model.layers.0.block_sparse_moe.down_proj.weight, " in text
    assert "not in the release's. (error for vLLM, SGLang, llama.cpp, mlx-lm)" in text
    assert "3 decay parameters are stored below float32 (model.layers.0.self_attn.A_log, " in text
    assert "there is no tokenizer (tokenizer.json or tiktoken.model)" in text


def test_a_tensor_too_many_or_a_key_too_few(directory):
    change(directory, lambda tensors: {**tensors, "model.mtp.x": torch.ones(1)})
    config = json.loads((directory / "config.json").read_text())
    del config["first_k_dense_replace"]
    (directory / "config.json").write_text(json.dumps(config))
    text = "\n".join(inspect(directory).odd)
    assert "1 tensors have no use in this network (model.mtp.x). (warning for llama.cpp)" in text
    assert "config.json has no first_k_dense_replace under the released names. (error for vLLM, " in text


def test_a_broken_checkpoint_is_shown_with_what_is_wrong(directory):
    change(directory, lambda tensors: {n: x for n, x in tensors.items() if n != "lm_head.weight"})
    found = inspect(directory)
    assert "1 missing (lm_head.weight)" in found.problem
    done = CliRunner().invoke(app, ["inspect", str(directory)])
    assert done.exit_code == 0
    assert "loads       no: " in done.stdout
