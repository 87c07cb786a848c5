import math

import pytest
import torch

from kimi_linear.base.errors import ConfigError, KimiLinearError, ShapeError
from kimi_linear.inference.sampler import RowGenerator, SamplingParams, sample


def support(logits, **options):
    """Every token that 300 draws of one row produce."""
    params = SamplingParams(seed=0, **options)
    generator = RowGenerator(0, 300)
    return set(sample(torch.tensor([logits]).expand(300, -1), None, params, generator).tolist())


def log_of(*probabilities):
    return [math.log(p) for p in probabilities]


def test_temperature_zero_takes_the_largest_and_the_lowest_id_at_a_tie():
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [0.0, 1.0, 5.0]])
    assert sample(logits, None, SamplingParams(temperature=0.0)).tolist() == [1, 0, 2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_floating_dtype_is_taken(dtype):
    logits = torch.tensor([[0.0, 9.0, 1.0]], dtype=dtype)
    assert sample(logits, None, SamplingParams(temperature=0.01), RowGenerator(0, 1)).tolist() == [1]


def test_draws_follow_the_softmax_of_the_scaled_logits():
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0]])
    draws = sample(logits.expand(40_000, -1), None, SamplingParams(temperature=1.7), RowGenerator(5, 40_000))
    expected = (logits[0].double() / 1.7).softmax(-1)
    frequency = draws.bincount(minlength=4).double() / len(draws)
    # Five standard deviations of a binomial frequency.
    assert ((frequency - expected).abs() < 5 * (expected * (1 - expected) / len(draws)).sqrt()).all()


def test_a_very_small_temperature_is_the_greedy_pick_and_not_nan():
    logits = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
    cold = sample(logits, None, SamplingParams(temperature=1e-300), RowGenerator(0, 8))
    assert torch.equal(cold, logits.argmax(-1))


def test_top_k_keeps_exactly_k_and_the_lower_ids_at_a_tie():
    assert support([0.0, 1.0, 1.0, 1.0, 2.0], top_k=3) == {1, 2, 4}
    assert support([0.0, 0.0, 0.0], top_k=1) == {0}
    assert support([0.0, 0.0, 0.0], top_k=50) == {0, 1, 2}


def test_top_p_keeps_the_token_that_crosses_the_mass():
    logits = log_of(0.1, 0.4, 0.3, 0.2)
    assert support(logits, top_p=0.39) == {1}
    assert support(logits, top_p=0.41) == {1, 2}
    assert support(logits, top_p=0.69) == {1, 2}
    assert support(logits, top_p=0.71) == {1, 2, 3}
    assert support(logits, top_p=1.0) == {0, 1, 2, 3}


def test_top_p_takes_the_lower_ids_at_a_tie():
    assert support([0.0, 0.0, 0.0, 0.0], top_p=0.6) == {0, 1, 2}


def test_top_p_widens_its_search_on_a_flat_distribution_over_a_large_vocabulary():
    logits = torch.zeros(1, 20_000)
    logits[0, 7] = 1.0
    generator = RowGenerator(0, 400)
    draws = sample(logits.expand(400, -1), None, SamplingParams(top_p=0.5), generator)
    # The mass of token 7 is e / (e + 19999); half the total needs about 9,998 of the others, lowest ids first.
    assert int(draws.max()) < 10_001
    assert int(draws.max()) > 9_000


def test_min_p_is_relative_to_the_most_likely_token():
    logits = log_of(0.5, 0.26, 0.24)
    assert support(logits, min_p=0.5) == {0, 1}
    assert support(logits, min_p=1.0) == {0}


def test_filters_apply_in_order_top_k_then_top_p_over_what_is_left():
    # Alone, 0.5 of the mass needs two tokens; after top-k the first of two has more than half of what is left.
    logits = log_of(0.4, 0.3, 0.2, 0.1)
    assert support(logits, top_p=0.5) == {0, 1}
    assert support(logits, top_k=2, top_p=0.5) == {0}


def test_temperature_comes_before_top_p():
    logits = log_of(0.6, 0.4)
    assert support(logits, top_p=0.55) == {0}
    assert support(logits, top_p=0.55, temperature=10.0) == {0, 1}


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_at_least_one_token_passes_every_filter(options):
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    picked = sample(logits, None, SamplingParams(**options), RowGenerator(0, 50))
    assert torch.equal(picked, logits.argmax(-1))


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    greedy = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    logits = torch.tensor([[3.0, 2.0, 1.0], [-1.0, -1.5, -9.0]])
    # Row 0: 3 / 2 < 2. Row 1: -1 * 2 < -1.5. Repeating a token does not penalise it twice; -1 is no token.
    assert sample(logits, torch.tensor([[0, 0], [0, -1]]), greedy).tolist() == [1, 1]
    assert sample(logits, torch.tensor([[-1, -1], [2, -1]]), greedy).tolist() == [0, 0]


def test_a_draw_depends_on_seed_row_and_step_and_not_on_the_neighbours():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(2))
    params = SamplingParams(top_p=0.9, seed=3)
    whole = RowGenerator(3, 6)
    first, second = sample(logits, None, params, whole), sample(logits, None, params, whole)
    assert not torch.equal(first, second)
    part = RowGenerator(3, 6)
    assert torch.equal(sample(logits, None, params, part), first)
    part.keep([1, 4])
    assert torch.equal(sample(logits[[1, 4]], None, params, part), second[[1, 4]])
    other = [sample(logits, None, params, RowGenerator(seed, 6)).tolist() for seed in (3, 4)]
    assert other[0] != other[1]


def test_generator_numbers_are_uniform_over_rows_and_over_steps():
    over_rows = RowGenerator(11, 20_000).next()
    generator = RowGenerator(11, 1)
    over_steps = [generator.next()[0] for _ in range(20_000)]
    for numbers in (torch.tensor(over_rows), torch.tensor(over_steps)):
        assert numbers.min() >= 0
        assert numbers.max() < 1
        counts = numbers.mul(100).long().bincount(minlength=100).double()
        # Chi-square with 99 degrees of freedom: mean 99, standard deviation 14.
        assert float(((counts - 200) ** 2 / 200).sum()) < 99 + 5 * 14


def test_without_a_seed_torch_governs():
    torch.manual_seed(5)
    first = RowGenerator(None, 3).next()
    assert RowGenerator(None, 3).next() != first
    torch.manual_seed(5)
    assert RowGenerator(None, 3).next() == first


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_an_error_naming_the_row(bad):
    logits = torch.zeros(3, 4)
    logits[2, 1] = bad
    with pytest.raises(KimiLinearError, match="row 2 "):
        sample(logits, None, SamplingParams(temperature=0.0))


def test_wrong_arguments_are_errors():
    logits = torch.zeros(2, 4)
    with pytest.raises(ShapeError, match=r"\[B, V\]"):
        sample(logits[0], None, SamplingParams(temperature=0.0))
    with pytest.raises(ConfigError, match="generator"):
        sample(logits, None, SamplingParams())
    with pytest.raises(ShapeError, match="3 rows"):
        sample(logits, None, SamplingParams(), RowGenerator(0, 3))
    with pytest.raises(ConfigError, match="history"):
        sample(logits, None, SamplingParams(temperature=0.0, repetition_penalty=1.1))
    with pytest.raises(ShapeError, match="history"):
        sample(logits, torch.zeros(3, 1).long(), SamplingParams(temperature=0.0, repetition_penalty=1.1))
