import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimi_linear.base.errors import CheckpointError, ConfigError
from kimi_linear.checkpoint.writer import parse_size, split_shards, write_shard, write_tensors

TENSORS = {
    "b.weight": torch.arange(3, dtype=torch.bfloat16),
    "a.weight": torch.randn(5, 7, generator=torch.Generator().manual_seed(0)),
    "stacked.0": torch.arange(12.0).view(2, 2, 3)[1],
    "transposed": torch.arange(6.0, dtype=torch.float64).view(2, 3).T,
    "half": torch.tensor([[0.5]], dtype=torch.float16),
    "empty": torch.zeros(0, 4),
}


def assert_equal(loaded, tensors):
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name], tensor)


def test_a_shard_is_what_the_safetensors_library_reads(tmp_path):
    write_shard(tmp_path / "x.safetensors", TENSORS)
    assert_equal(load_file(tmp_path / "x.safetensors"), TENSORS)


def test_a_shard_is_byte_for_byte_what_the_safetensors_library_writes(tmp_path):
    tensors = {name: tensor.contiguous().clone() for name, tensor in TENSORS.items() if tensor.numel()}
    write_shard(tmp_path / "ours.safetensors", tensors)
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_one_shard_needs_no_index(tmp_path):
    write_tensors(tmp_path, TENSORS, 10**6)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_several_shards_come_with_an_index_that_counts_bytes_and_parameters(tmp_path):
    tensors = {f"t{number}": torch.full((4,), float(number)) for number in range(5)}
    write_tensors(tmp_path, tensors, 32)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 80, "total_parameters": 20}
    assert index["weight_map"] == {f"t{n}": f"model-0000{n // 2 + 1}-of-00003.safetensors" for n in range(5)}
    loaded = {}
    for file_name in set(index["weight_map"].values()):
        loaded |= load_file(tmp_path / file_name)
    assert_equal(loaded, tensors)


def test_shards_keep_the_order_and_the_limit_and_a_large_tensor_stands_alone():
    tensors = {"a": torch.zeros(2), "b": torch.zeros(100), "c": torch.zeros(2), "d": torch.zeros(2)}
    assert [list(shard) for shard in split_shards(tensors, 16)] == [["a"], ["b"], ["c", "d"]]


def test_a_tensor_that_is_not_floating_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"counts is torch\.int64"):
        write_shard(tmp_path / "x.safetensors", {"counts": torch.zeros(2, dtype=torch.int64)})


@pytest.mark.parametrize(
    ("size", "expected"),
    [(7, 7), ("7", 7), ("5GB", 5 * 10**9), ("5 gib", 5 * 2**30), ("0.5KB", 500), ("2MiB", 2**21), ("1TB", 10**12)],
)
def test_sizes_are_read(size, expected):
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "0", 0, -1, "5 apples", "GB", True, None, 0.5, "0.1"])
def test_what_is_not_a_size_is_an_error(size):
    with pytest.raises(ConfigError, match="shard size"):
        parse_size(size)
