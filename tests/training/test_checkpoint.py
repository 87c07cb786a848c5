"""Checkpoints of a run: whole or absent, verified, restored bit for bit, never another run's."""

import json
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from kimi_linear.base.errors import CheckpointError, ConfigError
from kimi_linear.training.checkpoint import CheckpointStore, Snapshot, require_same, resumable_with, verify
from kimi_linear.training.loop import TrainConfig
from kimi_linear.training.optim import OptimConfig, build_optimizers
from training.toy import ToyBatches, ToyLM


def snapshot(step, **fields):
    values = {"tokens": 12 * step, "seconds": 0.1, "metrics": {"loss": 1 / 3}, "precision": {"name": "fp32"}}
    return Snapshot(step=step, position={"index": step}, **{**values, **fields})


def trained(steps=2, seed=0, **options):
    model = ToyLM(seed, **options)
    optimizers, batches = build_optimizers(model, OptimConfig()), ToyBatches()
    for _ in range(steps):
        batch = next(batches)
        model(batch.input_ids, batch.labels).loss.backward()
        optimizers.step(1.0)
    return model, optimizers


def store_with(directory, steps=(1, 2), **options):
    said = []
    store = CheckpointStore(directory, report=said.append, **options)
    pieces = trained()
    for step in steps:
        store.save(*pieces, snapshot(step))
    return store, pieces, said


def test_everything_comes_back(tmp_path):
    store, (model, optimizers), _ = store_with(tmp_path, steps=[])
    saved = snapshot(7, seconds=0.1 + 0.2, metrics={"loss": 2 / 3})
    path = store.save(model, optimizers, saved)
    assert path == tmp_path / "step-00000007"
    other, others = trained(steps=0, seed=5)
    assert store.load(path, other, others) == saved
    for (name, x), y in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    state = others.state_tensors()
    assert state.keys() == optimizers.state_tensors().keys()
    for name, tensor in optimizers.state_tensors().items():
        assert torch.equal(tensor, state[name]), name


def test_random_states_come_back(tmp_path):
    store, (model, optimizers), _ = store_with(tmp_path, steps=[])
    # An odd number of normal draws leaves a spare one in two of the generators.
    draw = lambda: (random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.randn(3).tolist())  # noqa: E731
    draw()
    path = store.save(model, optimizers, snapshot(1))
    expected = [draw() for _ in range(3)]
    store.load(path, model, optimizers)
    assert [draw() for _ in range(3)] == expected


def test_loading_keeps_the_tensors_the_optimizer_holds(tmp_path):
    store, (model, optimizers), _ = store_with(tmp_path)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    store.resume(model, optimizers)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path):
    store = CheckpointStore(tmp_path)
    model, optimizers = trained(tie_embeddings=True)
    store.save(model, optimizers, snapshot(1))
    other, others = trained(steps=0, seed=5, tie_embeddings=True)
    store.resume(other, others)
    assert other.lm_head.weight is other.embed_tokens.weight
    assert torch.equal(other.lm_head.weight, model.lm_head.weight)


def test_nothing_to_resume_is_none(tmp_path):
    store = CheckpointStore(tmp_path / "missing")
    assert store.latest() is None
    assert store.resume(*trained()) is None


def test_the_newest_are_kept(tmp_path):
    store, _, _ = store_with(tmp_path, steps=range(8, 12), keep=3)
    assert [path.name for path in store.paths()] == ["step-00000011", "step-00000010", "step-00000009"]
    assert len(list(tmp_path.iterdir())) == 3


def test_saving_a_step_again_replaces_it(tmp_path):
    store, pieces, _ = store_with(tmp_path)
    store.save(*pieces, snapshot(2, tokens=99))
    assert store.resume(*pieces).tokens == 99


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "truncated": (truncate, "is truncated"),
    "corrupt": (flip, "is corrupt"),
    "missing": (lambda file: file.unlink(), "not a complete checkpoint"),
    "empty": (lambda file: file.write_bytes(b""), "is truncated"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_an_error_by_itself_and_passed_over_in_a_resume(tmp_path, name, damage):
    store, (model, optimizers), said = store_with(tmp_path)
    newest = store.paths()[0]
    destroy, message = DAMAGE[damage]
    destroy(newest / name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        store.load(newest, model, optimizers)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert store.resume(model, optimizers).step == 1
    assert len(said) == 1
    assert "passing over a broken checkpoint" in said[0]
    assert "step-00000002" in said[0]


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"model.safetensors": 3}', '{"model.safetensors": {"size": 1}}'])
def test_a_damaged_manifest_is_an_error(tmp_path, text):
    store, _, _ = store_with(tmp_path)
    (store.paths()[0] / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError):
        verify(store.paths()[0])
    assert store.latest().name == "step-00000001"


def test_a_manifest_that_lists_nothing_is_an_error(tmp_path):
    store, _, _ = store_with(tmp_path)
    (store.paths()[0] / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        verify(store.paths()[0])


def test_only_broken_checkpoints_are_an_error_not_a_fresh_start(tmp_path):
    store, pieces, _ = store_with(tmp_path)
    for path in store.paths():
        (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints .* delete them to start again"):
        store.resume(*pieces)


def test_what_a_killed_process_left_is_swept_away(tmp_path):
    store_with(tmp_path)
    leftovers = [tmp_path / ".step-00000003.1234abcd.tmp", tmp_path / ".step-00000001.old"]
    for leftover in leftovers:
        shutil.copytree(tmp_path / "step-00000001", leftover)
    store = CheckpointStore(tmp_path)
    assert not any(leftover.exists() for leftover in leftovers)
    assert [path.name for path in store.paths()] == ["step-00000002", "step-00000001"]


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    store, _, _ = store_with(tmp_path)
    wide = ToyLM()
    wide.lm_head = nn.Linear(8, 14, bias=False)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is \(13, 8\) .* expected \(14, 8\)"):
        store.resume(wide, build_optimizers(wide, OptimConfig()))
    deep = ToyLM()
    deep.extra = nn.Linear(8, 8)
    with pytest.raises(CheckpointError, match="other optimizer groups"):
        store.resume(deep, build_optimizers(deep, OptimConfig()))
    frozen = ToyLM()
    frozen.register_buffer("extra", torch.zeros(2))
    with pytest.raises(CheckpointError, match="'extra' is in one of them only"):
        store.resume(frozen, build_optimizers(frozen, OptimConfig()))


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    store, (model, _), _ = store_with(tmp_path)
    with pytest.raises(CheckpointError, match="other optimizer groups"):
        store.resume(model, build_optimizers(model, OptimConfig(name="adamw")))


def test_another_number_of_threads_is_told(tmp_path):
    store, pieces, said = store_with(tmp_path)
    path = store.paths()[0]
    state = json.loads((path / "state.json").read_text())
    state["threads"] += 1
    (path / "state.json").write_text(json.dumps(state))
    (path / "manifest.json").unlink()
    from kimi_linear.training import checkpoint

    checkpoint._write_json(path / "manifest.json", checkpoint._manifest(path))
    assert store.resume(*pieces).step == 2
    assert "last bits" in said[0]


FULL_DISK = """
import resource, sys
from pathlib import Path
from test_checkpoint import snapshot, store_with
from kimi_linear.base.errors import CheckpointError
from kimi_linear.training.checkpoint import verify

store, pieces, _ = store_with(Path(sys.argv[1]))
largest = (store.paths()[0] / "model.safetensors").stat().st_size
# The kernel refuses longer files, as a full disk would; the second limit lets the model through and not the state.
for limit in (largest // 2, largest):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        store.save(*pieces, snapshot(3))
    except CheckpointError as error:
        print(error)
    verify(store.latest())
    print(sorted(path.name for path in Path(sys.argv[1]).iterdir()))
"""


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(tmp_path, request):
    folder = request.path.parent
    code = f"import sys; sys.path[:0] = {[str(folder), str(folder.parent), *sys.path]!r}\n{FULL_DISK}"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    lines = done.stdout.strip().split("\n")
    assert len(lines) == 4
    for message, names in (lines[:2], lines[2:]):
        assert "step-00000003 could not be written" in message
        assert "free disk space" in message
        assert names == "['step-00000001', 'step-00000002']"


def test_no_pickle_is_written(tmp_path):
    store, _, _ = store_with(tmp_path)
    names = {file.name for path in store.paths() for file in path.iterdir()}
    assert names == {"model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}


def test_keeping_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="keep is 0"):
        CheckpointStore(tmp_path, keep=0)


def test_equal_configurations_are_the_same_run():
    require_same({"a": 1, "b": {"c": [1, 2]}}, {"b": {"c": [1, 2]}, "a": 1}, frozenset())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ({"seed": 1}, {"seed": 2}, "seed was 1 when this run started and is 2 now"),
        ({"data": {"seq_len": 64}}, {"data": {"seq_len": 128}}, r"data\.seq_len was 64 .* is 128"),
        ({"model": {}}, {"model": {"theta": 1.0}}, r"model\.theta was None .* is 1\.0"),
        ({"layers": ["kda", "mla"]}, {"layers": ["mla", "kda"]}, r"layers was \['kda', 'mla'\]"),
        ({"model": "demo"}, {"model": {"a": 1}}, "model was 'demo'"),
    ],
)
def test_a_field_that_differs_is_named_with_both_values(old, new, message):
    with pytest.raises(ConfigError, match=message):
        require_same(old, new, frozenset())


def test_fields_that_change_only_the_course_may_differ():
    old, new = {"train": {"max_steps": 1, "accumulation": 2}}, {"train": {"max_steps": 9, "accumulation": 2}}
    require_same(old, new, frozenset({"train.max_steps"}))
    with pytest.raises(ConfigError, match=r"train\.max_steps"):
        require_same(old, new, frozenset({"max_steps"}))


def test_fields_that_decide_the_losses_may_not_differ():
    free = resumable_with(TrainConfig(max_steps=1))
    assert {"max_steps", "max_minutes", "checkpoint_every", "keep_checkpoints"} <= free
    assert not {"accumulation", "max_grad_norm", "precision"} & free
