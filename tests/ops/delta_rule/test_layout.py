"""Chunks, waves and tiles: every token is in exactly one, whatever the lengths, and loading and storing are inverse."""

import itertools

import pytest
import torch

from kimi_linear.base.errors import ShapeError
from kimi_linear.ops.delta_rule import layout
from kimi_linear.ops.delta_rule.layout import DenseTile, PackedTile, chunk_length, expand_heads, sum_heads

CPU = torch.device("cpu")
LENGTHS = [
    (0, 0, 0),
    (1,),
    (5, 0, 33, 64, 1, 1, 0),
    (200, 3),
    tuple(range(40)),
    (1,) * 100,
    (31, 32, 33, 31, 32, 33),
]


def offsets_of(lengths: tuple[int, ...]) -> list[int]:
    return [0, *itertools.accumulate(lengths)]


def packed(lengths: tuple[int, ...], tokens: int = 128, least: int = 1) -> list[layout.Group]:
    return list(layout.plan_packed(offsets_of(lengths), 32, tokens, least, CPU))


@pytest.mark.parametrize(
    ("longest", "length"),
    [(0, 1), (1, 1), (2, 2), (3, 4), (16, 16), (17, 32), (31, 32), (32, 32), (33, 32), (10**9, 32)],
)
def test_chunk_length_is_a_power_of_two_up_to_the_limit(longest, length) -> None:
    assert chunk_length(longest, 32) == length


@pytest.mark.parametrize("tokens", [1, 32, 128, 100_000])
@pytest.mark.parametrize("least", [1, 8])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_every_packed_token_is_in_one_tile(lengths, tokens, least) -> None:
    seen: list[int] = []
    groups = packed(lengths, tokens, least)
    for group in groups:
        for tile in group.tiles:
            assert isinstance(tile, PackedTile)
            assert tile.index.dtype == torch.int64
            assert len(tile.index) == sum(tile.waves)
            # Padding points at a token that exists.
            assert tile.index.min() >= 0
            assert tile.index.max() < max(sum(lengths), 1)
            seen += tile.index[tile.mask].tolist()
    assert sorted(seen) == list(range(sum(lengths)))
    named = sorted(n for group in groups for n in group.sequences.tolist())
    assert named == [n for n, length in enumerate(lengths) if length]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_waves_hold_the_chunks_of_a_prefix_of_the_group_in_order(lengths) -> None:
    offsets = offsets_of(lengths)
    for group in packed(lengths):
        chunk = chunk_length(max(lengths[n] for n in group.sequences.tolist()), 32)
        wave = 0
        for tile in group.tiles:
            rows = iter(zip(tile.index, tile.mask, strict=True))
            for active in tile.waves:
                for n in group.sequences.tolist()[:active]:
                    index, mask = next(rows)
                    start = offsets[n] + wave * chunk
                    assert index[mask].tolist() == list(range(start, min(start + chunk, offsets[n + 1])))
                wave += 1


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_no_packed_sequence_is_cut_otherwise_than_it_would_be_alone(lengths) -> None:
    for group in packed(lengths):
        for n in group.sequences.tolist():
            assert group.tiles[0].index.shape[1] == chunk_length(lengths[n], 32)


def test_short_sequences_beside_a_long_one_are_not_padded_to_its_chunks() -> None:
    rows = sum(tile.index.numel() for group in packed((500, *(1,) * 1000)) for tile in group.tiles)
    assert rows < 2 * 1500


@pytest.mark.parametrize("tokens", [1, 32, 128, 100_000])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_tiles_are_bounded(lengths, tokens) -> None:
    for group in packed(lengths, tokens):
        for tile in group.tiles:
            # At least a wave, which is bounded by the size of the group.
            assert tile.index.numel() <= max(tokens, 32, tile.waves[0] * tile.index.shape[1])
        assert len(group.sequences) * group.tiles[0].index.shape[1] <= max(tokens, 32)


@pytest.mark.parametrize(("B", "T"), [(0, 5), (1, 0), (1, 1), (3, 33), (7, 100), (2, 64), (50, 3)])
@pytest.mark.parametrize("rows", [1, 4, 1000])
@pytest.mark.parametrize("least", [1, 8])
def test_every_dense_token_is_in_one_tile(B, T, rows, least) -> None:
    seen = torch.zeros(B, T, dtype=torch.int64)
    chunk = chunk_length(T, 32)
    for group in layout.plan_dense(B, T, chunk, rows, least):
        starts = [tile.start for tile in group.tiles]
        assert starts == sorted(starts)
        for tile in group.tiles:
            assert (tile.first, tile.last) == (group.sequences.start, group.sequences.stop)
            assert tile.start % chunk == 0
            assert sum(tile.waves) <= max(rows, tile.waves[0])
            seen[tile.first : tile.last, tile.start : tile.end] += 1
    assert torch.equal(seen, torch.ones_like(seen))


@pytest.mark.parametrize("T", [1, 5, 31, 32, 33, 64, 70])
def test_a_dense_tile_loads_and_stores_its_tokens_alone(T) -> None:
    x = torch.randn(4, 80, 3, 5)
    tile = DenseTile(1, 3, 8, 8 + T, 32)
    loaded = tile.load(x, torch.float64)
    chunks = -(-T // 32)
    assert loaded.shape == (2 * chunks, 3, 32, 5)
    assert loaded.dtype == torch.float64
    padded = torch.cat([x[1:3, 8 : 8 + T], torch.zeros(2, 32 * chunks - T, 3, 5)], 1)
    expected = padded.view(2, chunks, 32, 3, 5).permute(1, 0, 3, 2, 4).flatten(0, 1)
    assert torch.equal(loaded, expected.double())
    valid = tile.valid(CPU)
    rows = torch.ones(2 * chunks, 32, dtype=torch.bool) if valid is None else valid
    assert (valid is None) == (T % 32 == 0)
    assert rows.sum() == 2 * T
    assert torch.equal(loaded[~rows[:, None, :].expand(-1, 3, -1)], torch.zeros(3 * int((~rows).sum()), 5).double())
    target = torch.full((4, 80, 3, 5), 7.0)
    tile.store(target, loaded)
    expected = torch.full_like(target, 7.0)
    expected[1:3, 8 : 8 + T] = x[1:3, 8 : 8 + T]
    assert torch.equal(target, expected)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_tiles_load_and_store_what_they_name(lengths) -> None:
    x = torch.randn(1, sum(lengths), 2, 3, dtype=torch.bfloat16)
    target = torch.full_like(x, float("nan"))
    for group in packed(lengths):
        for tile in group.tiles:
            loaded = tile.load(x, torch.float32)
            assert torch.equal(loaded.transpose(1, 2)[~tile.mask], torch.zeros(int((~tile.mask).sum()), 2, 3))
            tile.store(target, loaded)
    assert torch.equal(target, x)


def test_rows_past_the_end_are_zero_even_beside_infinities() -> None:
    x = torch.full((1, 5, 1, 1), float("inf"))
    for tile in (DenseTile(0, 1, 0, 5, 8), next(iter(layout.plan_packed([0, 5], 32, 32, 1, CPU))).tiles[0]):
        assert torch.equal(tile.load(x, torch.float32).flatten()[5:], torch.zeros(3))


def test_summing_heads_is_the_transpose_of_expanding_them() -> None:
    x, y = torch.randn(2, 5, 3, 4).double(), torch.randn(2, 5, 6, 4).double()
    torch.testing.assert_close((expand_heads(x, 6) * y).sum(), (x * sum_heads(y, 3)).sum())
    assert torch.equal(expand_heads(x, 6)[:, :, 3], x[:, :, 1])
    assert expand_heads(x, 3) is x
    assert sum_heads(x, 3) is x


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 5], r"cu_seqlens runs from 1 to 5, expected from 0 to T = 5"),
        ([0, 4], r"cu_seqlens runs from 0 to 4, expected from 0 to T = 5"),
        ([0, 3, 2, 5], r"cu_seqlens falls from 3 to 2 at index 2"),
    ],
)
def test_offsets_that_do_not_cut_the_tokens_are_refused(offsets, message) -> None:
    with pytest.raises(ShapeError, match=message):
        layout.read_cu_seqlens(torch.tensor(offsets), 5)
