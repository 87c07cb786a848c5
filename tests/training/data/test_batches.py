import json
from itertools import islice

import pytest
import torch

from kimi_linear.base.errors import ConfigError, DataError
from kimi_linear.training.data import PackedBatches


@pytest.fixture
def shards(make_shards):
    return make_shards()


def take(batches, count):
    return list(islice(batches, count))


def stream_of(batches):
    return torch.cat([batch.input_ids[0] for batch in batches]).tolist()


def assert_equal(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.cu_seqlens, b.cu_seqlens)
        assert a.num_bytes == b.num_bytes


def expected_units(shards, *, reset):
    eos = shards.manifest.eos_id
    lengths = shards.document_tokens.tolist()
    units = [[eos, *shards.read(i, 0, n).tolist(), *([eos] if reset else [])] for i, n in enumerate(lengths)]
    return sorted(units)


def split_into_units(stream, eos, *, reset):
    """Cut a stream of whole epochs back into documents, knowing only how they are laid out."""
    units = []
    while stream:
        assert stream[0] == eos
        rest = stream[1:]
        end = 1 + (rest.index(eos) if eos in rest else len(rest)) + reset
        units.append(stream[:end])
        stream = stream[end:]
    return units


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize(("seq_len", "batch_size"), [(2, 1), (7, 3), (64, 2), (5000, 1)])
def test_every_epoch_holds_every_document_once(shards, reset, seq_len, batch_size):
    batches = PackedBatches(shards, seq_len=seq_len, batch_size=batch_size, reset_documents=reset)
    size = batches.tokens_per_epoch
    stream = stream_of(take(batches, -(-3 * size // (seq_len * batch_size))))
    for epoch in range(3):
        units = split_into_units(stream[epoch * size : (epoch + 1) * size], shards.manifest.eos_id, reset=reset)
        assert sorted(units) == expected_units(shards, reset=reset)


@pytest.mark.parametrize(("seq_len", "batch_size"), [(2, 1), (7, 3), (64, 2), (5000, 1)])
def test_sequences_begin_at_rows_and_documents(shards, seq_len, batch_size):
    batches = PackedBatches(shards, seq_len=seq_len, batch_size=batch_size)
    size = seq_len * batch_size
    num_batches = -(-2 * batches.tokens_per_epoch // size)
    taken = take(batches, num_batches)
    begins, position = set(range(0, num_batches * size, seq_len)), 0
    stream = stream_of(taken)
    units = split_into_units(stream[: 2 * batches.tokens_per_epoch], shards.manifest.eos_id, reset=True)
    for unit in units:
        begins.add(position)
        position += len(unit)
    found = {i * size + begin for i, batch in enumerate(taken) for begin in batch.cu_seqlens[:-1].tolist()}
    assert {begin for begin in found if begin < position} == {begin for begin in begins if begin < position}


def test_without_resets_only_rows_begin_sequences(shards):
    for batch in take(PackedBatches(shards, seq_len=16, batch_size=4, reset_documents=False), 50):
        assert batch.cu_seqlens.tolist() == [0, 16, 32, 48, 64]


def test_batches_are_packed_in_the_layout_of_the_model(shards):
    for batch in take(PackedBatches(shards, seq_len=16, batch_size=4), 50):
        assert (batch.input_ids.dtype, batch.input_ids.shape) == (torch.int64, (1, 64))
        assert batch.cu_seqlens.dtype == torch.int32
        assert (batch.cu_seqlens[0], batch.cu_seqlens[-1]) == (0, 64)
        assert (batch.cu_seqlens.diff() > 0).all()
        assert batch.cu_seqlens.diff().max() <= 16
        assert torch.equal(batch.labels, batch.input_ids)


def test_targets_and_their_bytes_are_counted(shards):
    for batch in take(PackedBatches(shards, seq_len=16, batch_size=4), 50):
        begins = set(batch.cu_seqlens.tolist())
        targets = [token for i, token in enumerate(batch.input_ids[0].tolist()) if i not in begins]
        assert batch.num_targets == len(targets)
        assert batch.num_bytes == sum(int(shards.token_lengths[token]) for token in targets)


def test_same_arguments_give_the_same_batches(shards):
    first = take(PackedBatches(shards, seq_len=16, batch_size=4, seed=3), 30)
    assert_equal(first, take(PackedBatches(shards, seq_len=16, batch_size=4, seed=3), 30))
    assert stream_of(first) != stream_of(take(PackedBatches(shards, seq_len=16, batch_size=4, seed=4), 30))


def test_every_epoch_has_its_own_order(shards):
    batches = PackedBatches(shards, seq_len=2, batch_size=1)
    stream = stream_of(take(batches, 3 * batches.tokens_per_epoch))
    size = batches.tokens_per_epoch
    epochs = {tuple(stream[i * size : (i + 1) * size]) for i in range(6)}
    assert len(epochs) > 1


def test_order_of_documents_never_changes_between_versions(make_shards, tokenizer):
    # Recorded once. A change would make an interrupted run go on with other data.
    shards = make_shards("abcdefgh")
    batches = PackedBatches(shards, seq_len=24, batch_size=1, seed=1234)
    decoded = [tokenizer.decode(batch.input_ids[0].tolist(), skip_special=True) for batch in take(batches, 3)]
    assert decoded == ["efdbcagh", "fhbdecag", "fgcdbeah"]


@pytest.mark.parametrize("interruption", range(0, 60, 7))
def test_resuming_anywhere_gives_the_remaining_batches(shards, interruption):
    whole = take(PackedBatches(shards, seq_len=16, batch_size=2), 60)
    batches = PackedBatches(shards, seq_len=16, batch_size=2)
    assert_equal(take(batches, interruption), whole[:interruption])
    state = json.loads(json.dumps(batches.state()))
    resumed = PackedBatches(shards, seq_len=16, batch_size=2)
    resumed.load_state(state)
    assert resumed.state() == state
    assert_equal(take(resumed, 60 - interruption), whole[interruption:])
    # Back again, in the same object.
    resumed.load_state(state)
    assert_equal(take(resumed, 60 - interruption), whole[interruption:])


def test_resuming_may_change_the_batch_size(shards):
    batches = PackedBatches(shards, seq_len=16, batch_size=2)
    take(batches, 9)
    resumed = PackedBatches(shards, seq_len=8, batch_size=5)
    resumed.load_state(batches.state())
    assert stream_of(take(resumed, 4)) == stream_of(take(batches, 5))


def test_epoch_counts_passes(shards):
    batches = PackedBatches(shards, seq_len=16, batch_size=2)
    assert batches.epoch == 0.0
    take(batches, 40)
    assert batches.epoch == pytest.approx(40 * 32 / batches.tokens_per_epoch)
    assert batches.state()["epoch"] == int(batches.epoch)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_stream_without_overlap(shards, world_size):
    one = PackedBatches(shards, seq_len=16, batch_size=2 * world_size)
    ranks = [
        PackedBatches(shards, seq_len=16, batch_size=2, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for _ in range(40):
        assert stream_of([next(one)]) == stream_of([next(rank) for rank in ranks])
    assert all(rank.state() == one.state() for rank in ranks)


def test_one_tiny_document_fills_any_row(make_shards, tokenizer):
    shards = make_shards(["a"])
    batch = next(PackedBatches(shards, seq_len=8, batch_size=1))
    assert batch.input_ids.tolist() == [[0, *tokenizer.encode("a"), 0] * 2 + [0, *tokenizer.encode("a")]]
    assert batch.cu_seqlens.tolist() == [0, 3, 6, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1}, "seq_len is 1, expected 2 or more"),
        ({"batch_size": 0}, "batch_size is 0, expected 1 or more"),
        ({"world_size": 0}, "world_size is 0, expected 1 or more"),
        ({"rank": 2, "world_size": 2}, "rank is 2, expected 0 to 1 .world_size is 2."),
        ({"rank": -1}, "rank is -1, expected 0 to 0"),
        ({"seed": -1}, "seed is -1, expected 0 to 4294967295"),
        ({"seed": 1 << 32}, "seed is 4294967296, expected 0 to 4294967295"),
    ],
)
def test_bad_arguments_are_one_sentence(shards, options, message):
    with pytest.raises(ConfigError, match=message):
        PackedBatches(shards, **{"seq_len": 16, "batch_size": 2, **options})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "has seed 1, this run has 0"),
        ({"dataset": "other"}, "has dataset 'other', this run has"),
        ({"reset_documents": False}, "has reset_documents False, this run has True"),
        ({"epoch": -1}, "has no epoch and position of this stream"),
        ({"position": 10**9}, "has no epoch and position of this stream"),
        ({"position": None}, "has no epoch and position of this stream"),
    ],
)
def test_state_of_another_stream_is_refused(shards, change, message):
    batches = PackedBatches(shards, seq_len=16, batch_size=2)
    take(batches, 3)
    before = batches.state()
    with pytest.raises(DataError, match=message):
        batches.load_state({**before, **change})
    assert batches.state() == before
