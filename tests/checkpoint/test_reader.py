import json
import pickle

import pytest
import torch

from kimi_linear.base.errors import CheckpointError, list_names
from kimi_linear.checkpoint.reader import open_shard, stored_tensors
from kimi_linear.checkpoint.writer import write_tensors

TENSORS = {f"t{number}": torch.full((4,), float(number)) for number in range(5)}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path):
    write_tensors(tmp_path, TENSORS, 32)
    return tmp_path


def edit_index(directory, change):
    index = json.loads((directory / INDEX).read_text())
    change(index)
    (directory / INDEX).write_text(json.dumps(index))


def error_of(directory):
    with pytest.raises(CheckpointError) as caught:
        stored_tensors(directory)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def header_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_every_tensor_is_found_with_its_file_shape_and_dtype(sharded):
    stored = stored_tensors(sharded)
    assert stored.keys() == TENSORS.keys()
    assert stored["t4"].file.name == "model-00003-of-00003.safetensors"
    assert stored["t4"].shape == (4,)
    assert stored["t4"].dtype == "F32"
    with open_shard(stored["t4"].file) as file:
        tensor = file.get_tensor("t4")
    assert torch.equal(tensor, TENSORS["t4"])


def test_nothing_there(tmp_path):
    assert "holds neither model.safetensors nor" in error_of(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_pickle_files_are_never_loaded(tmp_path, name):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    message = error_of(tmp_path)
    assert name in message
    assert "never loaded" in message
    assert not (tmp_path / "executed").exists()


def test_missing_shard(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors does not exist" in error_of(sharded)


@pytest.mark.parametrize("keep", [0, 5, 20, 120, -1])
def test_truncated_shard(sharded, keep):
    path = sharded / "model-00001-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "model-00001-of-00003.safetensors is not a whole safetensors file" in error_of(sharded)


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12),
        ({"a": entry(0, 8), "b": entry(16, 24)}, 24),
        ({"a": entry(0, 8)}, 24),
        ({"a": entry(0, 8)}, 4),
        ({"a": entry(8, 0)}, 8),
        ({"a": entry(0, 8, shape=(3,))}, 8),
        ({"a": entry(0, 8, dtype="F33")}, 8),
        ({"a": entry(0, 8, shape=(2**40, 2**40))}, 8),
        (b"\xff\xfe not json", 8),
        (b"[1, 2]", 8),
    ],
    ids=[
        "overlap",
        "gap",
        "bytes left over",
        "too short",
        "backwards",
        "shape",
        "dtype",
        "overflow",
        "garbage",
        "list",
    ],
)
def test_a_header_that_lies(tmp_path, header, size):
    header_file(tmp_path / "model.safetensors", header, b"\0" * size)
    assert "is not a whole safetensors file" in error_of(tmp_path)


def test_a_header_longer_than_the_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 8 + b"{}")
    assert "is not a whole safetensors file" in error_of(tmp_path)


@pytest.mark.parametrize(
    "file_name",
    ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\\b.safetensors", "x.bin", 3, None],
)
def test_an_index_cannot_point_outside_its_directory_or_at_another_format(sharded, file_name):
    edit_index(sharded, lambda index: index["weight_map"].update(t1=file_name))
    message = error_of(sharded)
    assert repr(file_name) in message
    assert "expected the name of a .safetensors file" in message


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\x00"])
def test_an_index_that_is_not_one(sharded, text):
    (sharded / INDEX).write_text(text)
    assert INDEX in error_of(sharded)


def test_an_index_that_is_not_text(sharded):
    (sharded / INDEX).write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in error_of(sharded)


def test_an_index_that_names_a_tensor_its_shard_does_not_have(sharded):
    edit_index(sharded, lambda index: index["weight_map"].update(ghost="model-00001-of-00003.safetensors"))
    assert "names tensors that no file holds (ghost)" in error_of(sharded)


def test_a_shard_with_a_tensor_the_index_does_not_name(sharded):
    edit_index(sharded, lambda index: index["weight_map"].pop("t1"))
    assert "does not name tensors that its files hold (t1)" in error_of(sharded)


def test_only_the_first_ten_names_are_listed():
    assert list_names({f"n{number:02}" for number in range(12)}).endswith("n09 and 2 more")
    assert list_names({"b", "a"}) == "a, b"
