"""Headers are read without mapping the file, and tensors are windows on their own pages."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from kimi_linear.base.errors import CheckpointError
from kimi_linear.causal_lm import KimiLinearForCausalLM
from kimi_linear.checkpoint.header import read_header
from kimi_linear.checkpoint.mapped import MappedCheckpoint, map_window
from kimi_linear.models.kimi_linear.presets import preset

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def header_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.fixture
def file(tmp_path):
    """A file with tensors of all dtypes and of odd sizes, some larger than a page."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 5), "b": (1,), "c": (1111, 7), "d": (0, 4), "e": (2, 3000), "f": ()}
    tensors = {
        f"{name}.{dtype}": torch.randn(shape, generator=draw).to(dtype)
        for name, shape in shapes.items()
        for dtype in DTYPES.values()
    }
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    return tmp_path / "x.safetensors"


def test_every_tensor_is_where_the_header_says(file):
    with safe_open(file, framework="pt") as peer:
        names = peer.keys()
        entries = read_header(file)
        assert entries.keys() == set(names)
        for name in names:
            e = entries[name]
            assert torch.equal(map_window(file, e.start, e.shape, DTYPES[e.dtype]), peer.get_tensor(name)), name


def test_a_tensor_that_is_not_aligned_reads_the_same(tmp_path):
    """The format does not ask for alignment, so a header of any length may come before the tensors."""
    values = torch.tensor([1.5, -2.0])
    header = json.dumps({"t": entry(0, 8)}).encode()
    header += b" " * (1 - len(header) % 2)
    path = header_file(tmp_path / "x", header, values.numpy().tobytes())
    found = read_header(path)["t"]
    assert found.start % 4 != 0
    window = map_window(path, found.start, found.shape, torch.float32)
    assert torch.equal(window, values)
    assert window.data_ptr() % 4 == 0


def test_writing_to_a_window_leaves_the_file(file):
    before = file.read_bytes()
    found = read_header(file)["c.torch.float32"]
    map_window(file, found.start, found.shape, torch.float32).zero_()
    assert file.read_bytes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/maps")
def test_a_window_maps_its_own_pages_until_its_last_view_is_gone(file):
    def mapped():
        lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(file) in line]
        return [int(end, 16) - int(begin, 16) for begin, end in (line.split()[0].split("-") for line in lines)]

    found = read_header(file)["e.torch.float16"]
    window = map_window(file, found.start, found.shape, torch.float16)
    row = window[1]
    assert len(mapped()) == 1
    assert window.nbytes <= mapped()[0] <= window.nbytes + 2 * 4096
    del window
    assert len(mapped()) == 1
    del row
    assert mapped() == []


def test_a_file_that_became_shorter_is_refused(file):
    found = read_header(file)["e.torch.float64"]
    with pytest.raises(CheckpointError, match=r"cannot map \d+ bytes of .*x.safetensors"):
        map_window(file, found.start + 10**6, found.shape, torch.float64)


GOOD = {"a": entry(0, 8), "b": entry(8, 16)}
DAMAGED = {
    "a gap": ({"a": entry(0, 8), "b": entry(9, 17)}, 17),
    "an overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12),
    "an end before its beginning": ({"a": entry(8, 0), "b": entry(0, 8)}, 8),
    "data behind the last": (GOOD, 17),
    "data missing": (GOOD, 15),
    "too few bytes for the shape": ({"a": entry(0, 8, (3,))}, 8),
    "a shape whose product is huge": ({"a": entry(0, 8, [10**9] * 10000)}, 8),
    "a negative size": ({"a": entry(0, 8, (-2, -1))}, 8),
    "a size that is true": ({"a": entry(0, 4, (True,))}, 4),
    "three offsets": ({"a": {**entry(0, 8), "data_offsets": [0, 8, 8]}}, 8),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8),
    "an unknown key": ({"a": {**entry(0, 8), "x": 1}}, 8),
    "a dtype that is a number": ({"a": entry(0, 8, dtype=4)}, 8),
    "a list": ([], 0),
    "nothing": (b"", 0),
    "no JSON": (b"{", 0),
    "no UTF-8": (b'{"\xff": 1}', 0),
    "a name twice": (json.dumps({"a": entry(0, 8), "b": entry(0, 8)}).replace('"b"', '"a"').encode(), 8),
    "endless depth": (b"[" * 200_000, 0),
}


def test_a_whole_header_is_read(tmp_path):
    found = read_header(header_file(tmp_path / "x", {**GOOD, "__metadata__": {"format": "pt"}}, bytes(16)))
    start = (tmp_path / "x").stat().st_size - 16
    assert [(name, e.start - start, e.stop - start) for name, e in found.items()] == [("a", 0, 8), ("b", 8, 16)]


@pytest.mark.parametrize(("header", "size"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_header_is_refused_in_a_sentence(tmp_path, header, size):
    path = header_file(tmp_path / "x", header, bytes(size))
    with pytest.raises(CheckpointError, match="is not a whole safetensors file") as caught:
        read_header(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"1234567", (2**63).to_bytes(8, "little"), (9).to_bytes(8, "little") + b"{}"])
def test_a_length_beyond_the_file_is_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match="its header claims"):
        read_header(tmp_path / "x")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone.safetensors does not exist"):
        read_header(tmp_path / "gone.safetensors")


@pytest.fixture(scope="module")
def bytes_of_a_file(tmp_path_factory):
    path = header_file(tmp_path_factory.mktemp("fuzz") / "x", {**GOOD, "__metadata__": {"k": "v"}}, bytes(16))
    return path, path.read_bytes()


@settings(max_examples=300, deadline=None, database=None)
@given(place=st.integers(0, 200), new=st.binary(max_size=3), cut=st.integers(0, 3))
def test_whatever_is_changed_is_refused_or_lies_inside_the_file(bytes_of_a_file, place, new, cut):
    path, content = bytes_of_a_file
    changed = content[:place] + new + content[place + cut :]
    path.write_bytes(changed)
    try:
        entries = read_header(path)
    except CheckpointError:
        return
    spans = sorted((e.start, e.stop) for e in entries.values())
    assert all(0 <= begin <= end <= len(changed) for begin, end in spans)
    assert all(one[1] <= other[0] for one, other in pairwise(spans))


def test_rows_are_read_alone_and_counted(tmp_path):
    model = KimiLinearForCausalLM(preset("tiny"), generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    mapped = MappedCheckpoint(tmp_path, model.config)
    assert mapped.stored_bytes == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert mapped.dtype == torch.float32
    rows = mapped.read("model.embed_tokens.weight", slice(5, 8))
    assert torch.equal(rows, model.model.embed_tokens.weight[5:8])
    assert mapped.bytes_read == rows.nbytes
