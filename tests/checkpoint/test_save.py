import errno
import json
import os
import stat

import pytest
import torch

from kimi_linear.base.errors import CheckpointError, ConfigError
from kimi_linear.causal_lm import KimiLinearForCausalLM, load_model
from kimi_linear.checkpoint import save as saving
from kimi_linear.checkpoint import writer
from kimi_linear.models.kimi_linear.presets import preset


@pytest.fixture(scope="module")
def model():
    return KimiLinearForCausalLM(preset("tiny"), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def changed():
    return KimiLinearForCausalLM(preset("tiny"), generator=torch.Generator().manual_seed(1))


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def fill_the_disk_after(monkeypatch, shards):
    """Let so many shards through, then fail in the middle of the next one, as a full disk does."""
    write_shard = writer.write_shard
    written = []

    def failing(path, *tensors):
        if len(written) == shards:
            path.write_bytes(b"half a header")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written.append(path)
        write_shard(path, *tensors)

    monkeypatch.setattr(writer, "write_shard", failing)


@pytest.mark.parametrize("shards", [0, 2])
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, model, shards):
    fill_the_disk_after(monkeypatch, shards)
    with pytest.raises(CheckpointError, match=r"cannot save to .*: No space left on device .* is unchanged\.$"):
        model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_checkpoint_as_it_was(tmp_path, monkeypatch, model, changed):
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    before = contents(tmp_path)
    fill_the_disk_after(monkeypatch, 2)
    with pytest.raises(CheckpointError, match="No space left"):
        changed.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch, model):
    def interrupted(path, *tensors):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_flush_is_a_failed_save(tmp_path, monkeypatch, model):
    def failing(handle):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(CheckpointError, match="Input/output error; what was there before is unchanged"):
        model.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_every_file_is_flushed_before_the_rename(tmp_path, monkeypatch, model):
    flushed = []
    fsync = os.fsync

    def watched(handle):
        flushed.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names <= {os.path.basename(path) for path in flushed}


def test_saving_over_a_checkpoint_replaces_its_weights_and_keeps_the_other_files(tmp_path, model, changed):
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    (tmp_path / "model" / "tokenizer.json").write_text("the tokenizer")
    (tmp_path / "model" / "LICENSE").write_text("the licence")
    changed.save_pretrained(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "LICENSE",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "the tokenizer"
    loaded = load_model(tmp_path / "model")
    assert torch.equal(loaded.model.embed_tokens.weight, changed.model.embed_tokens.weight)


def test_a_new_tokenizer_replaces_the_old_one_and_only_here(tmp_path, model):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("old")
    os.link(tmp_path / "model" / "tokenizer.json", tmp_path / "elsewhere.json")
    (tmp_path / "new.json").write_text("new")
    model.save_pretrained(tmp_path / "model", tokenizer_file=tmp_path / "new.json")
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "new"
    assert (tmp_path / "elsewhere.json").read_text() == "old"


def test_a_loaded_model_can_be_saved_where_it_came_from(tmp_path, model):
    model.save_pretrained(tmp_path / "model")
    before = contents(tmp_path)
    load_model(tmp_path / "model").save_pretrained(tmp_path / "model")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.write_text("x"), "it is a file"),
        (lambda path: (path.mkdir(), (path / "thesis.txt").write_text("x")), "it has no config.json"),
        (lambda path: (path / "photos").mkdir(parents=True), "it holds photos/"),
        (lambda path: ((path / ".git").mkdir(parents=True), (path / "config.json").write_text("{}")), "it holds .git/"),
    ],
)
def test_what_is_no_checkpoint_is_never_replaced(tmp_path, model, make, reason):
    make(tmp_path / "target")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=reason):
        model.save_pretrained(tmp_path / "target")
    assert contents(tmp_path) == before


def test_an_empty_directory_and_missing_parents_are_fine(tmp_path, model):
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    model.save_pretrained(tmp_path / "a" / "b")
    load_model(tmp_path / "empty")
    load_model(tmp_path / "a" / "b")


def test_a_link_to_a_directory_keeps_being_one(tmp_path, model):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    model.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    load_model(tmp_path / "real")


def test_a_parent_that_is_a_file_is_one_sentence(tmp_path, model):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot save to"):
        model.save_pretrained(tmp_path / "file" / "model")


def test_a_missing_tokenizer_file_is_named(tmp_path, model):
    with pytest.raises(CheckpointError, match=r"No such file or directory \(.*gone\.json\)"):
        model.save_pretrained(tmp_path / "model", tokenizer_file=tmp_path / "gone.json")
    assert list(tmp_path.iterdir()) == []


def test_a_bad_shard_size_writes_nothing(tmp_path, model):
    with pytest.raises(ConfigError, match="shard size"):
        model.save_pretrained(tmp_path / "model", max_shard_size="much")
    assert list(tmp_path.iterdir()) == []


def test_a_model_with_other_tensors_is_refused(tmp_path, model):
    state = {**model.state_dict(), "lora.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"does not \(lora\.weight\)"):
        saving.save_checkpoint(state, model.config, tmp_path / "model")
    del state["lora.weight"], state["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        saving.save_checkpoint(state, model.config, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_tensors_are_written_one_at_a_time(tmp_path, monkeypatch):
    model = KimiLinearForCausalLM(preset("tiny"))
    copies = []
    contiguous = torch.Tensor.contiguous

    def watched(tensor, *args, **kwargs):
        result = contiguous(tensor, *args, **kwargs)
        copies.append(result.data_ptr() != tensor.data_ptr())
        return result

    monkeypatch.setattr(torch.Tensor, "contiguous", watched)
    model.save_pretrained(tmp_path / "model")
    # On the CPU nothing is copied at all: experts are written from inside their stacked tensors.
    assert len(copies) == len(load_names(tmp_path / "model"))
    assert not any(copies)


def load_names(directory):
    raw = (directory / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return header.keys() - {"__metadata__"}


def test_files_are_readable_by_others_as_usual(tmp_path, model):
    (tmp_path / "plain").write_text("")
    usual = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    model.save_pretrained(tmp_path / "model")
    assert all(stat.S_IMODE(path.stat().st_mode) == usual for path in (tmp_path / "model").iterdir())
