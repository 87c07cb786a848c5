import itertools
import math

import pytest
import torch

from kimi_linear.base.errors import ConfigError
from kimi_linear.training.data import ValidationBatches

SIZES = [(2, 1), (3, 5), (17, 4), (64, 3), (5000, 8)]


@pytest.fixture
def shards(make_shards):
    return make_shards()


def documents_of(shards):
    return [shards.read(i, 0, n).tolist() for i, n in enumerate(shards.document_tokens.tolist())]


def sequences_of(batches):
    for batch in batches:
        bounds = batch.cu_seqlens.tolist()
        ids = batch.input_ids[0].tolist()
        yield from (ids[begin:end] for begin, end in itertools.pairwise(bounds))


@pytest.mark.parametrize(("seq_len", "batch_size"), SIZES)
def test_every_token_is_a_target_exactly_once(shards, seq_len, batch_size):
    batches = ValidationBatches(shards, seq_len=seq_len, batch_size=batch_size)
    targets = [token for sequence in sequences_of(batches) for token in sequence[1:]]
    assert targets == [token for document in documents_of(shards) for token in document]
    assert shards.manifest.eos_id not in targets


@pytest.mark.parametrize(("seq_len", "batch_size"), SIZES)
def test_counts_add_up_to_the_whole_text(shards, seq_len, batch_size):
    batches = ValidationBatches(shards, seq_len=seq_len, batch_size=batch_size)
    assert sum(batch.num_bytes for batch in batches) == shards.num_bytes
    assert sum(batch.num_targets for batch in batches) == shards.num_tokens
    assert len(batches) == len(list(batches))


@pytest.mark.parametrize(("seq_len", "batch_size"), SIZES)
def test_windows_are_packed_in_the_layout_of_the_model(shards, seq_len, batch_size):
    for batch in ValidationBatches(shards, seq_len=seq_len, batch_size=batch_size):
        assert (batch.input_ids.dtype, batch.cu_seqlens.dtype) == (torch.int64, torch.int32)
        assert batch.input_ids.shape == (1, int(batch.cu_seqlens[-1]))
        assert 2 <= int(batch.cu_seqlens.diff().min()) <= int(batch.cu_seqlens.diff().max()) <= seq_len
        assert len(batch.cu_seqlens) - 1 <= batch_size


@pytest.mark.parametrize(("seq_len", "batch_size"), SIZES)
def test_bits_per_byte_of_a_bigram_model_does_not_depend_on_windows(shards, seq_len, batch_size):
    # A model that looks one token back sees the same in any window, so its figure must be that of whole documents.
    def nll(previous, token):
        return math.log(1.5 + (31 * previous + 17 * token) % 101)

    eos = shards.manifest.eos_id
    whole = sum(
        nll(previous, token)
        for document in documents_of(shards)
        for previous, token in zip([eos, *document], document, strict=False)
    )
    total = num_bytes = 0.0
    for batch in ValidationBatches(shards, seq_len=seq_len, batch_size=batch_size):
        num_bytes += batch.num_bytes
        for sequence in sequences_of([batch]):
            total += sum(nll(*pair) for pair in itertools.pairwise(sequence))
    assert total / math.log(2) / num_bytes == pytest.approx(whole / math.log(2) / shards.num_bytes, rel=1e-12)


def test_iterating_again_gives_the_same(shards):
    batches = ValidationBatches(shards, seq_len=16, batch_size=2)
    assert list(sequences_of(batches)) == list(sequences_of(batches))


@pytest.mark.parametrize("every", [2, 3, 1000])
def test_subset_is_every_nth_batch(shards, every):
    whole = list(ValidationBatches(shards, seq_len=16, batch_size=2))
    subset = ValidationBatches(shards, seq_len=16, batch_size=2, every=every)
    assert len(subset) == len(whole[::every])
    assert list(sequences_of(subset)) == list(sequences_of(whole[::every]))


@pytest.mark.parametrize("options", [{"seq_len": 1}, {"batch_size": 0}, {"every": 0}])
def test_bad_arguments_are_one_sentence(shards, options):
    (name, value), *_ = options.items()
    with pytest.raises(ConfigError, match=f"{name} is {value}, expected"):
        ValidationBatches(shards, **{"seq_len": 16, "batch_size": 2, **options})
