"""Learning-rate schedules: published points, continuity, limits."""

import math

import pytest

from kimi_linear.base.errors import ConfigError
from kimi_linear.training.schedule import ScheduleConfig, build_schedule, cosine, wsd

# Kimi K2 (arXiv:2507.20534): 500 warm-up steps of 67M tokens, 2e-4 until 10T, cosine to 2e-5 at 15.5T.
K2_TOKENS = 15.5e12
K2 = {"warmup": 500 * 67e6 / K2_TOKENS, "decay": 5.5e12 / K2_TOKENS, "final": 0.1}


@pytest.mark.parametrize(
    ("tokens", "rate"), [(16.75e9, 1e-4), (5e12, 2e-4), (10e12, 2e-4), (12.75e12, 1.1e-4), (15.5e12, 2e-5)]
)
def test_wsd_gives_the_published_rates_of_kimi_k2(tokens, rate):
    assert 2e-4 * wsd(tokens / K2_TOKENS, **K2) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize("corner", [K2["warmup"], 1 - K2["decay"]])
def test_wsd_is_continuous_where_its_parts_meet(corner):
    before, after = wsd(corner - 1e-9, **K2), wsd(corner + 1e-9, **K2)
    assert before == pytest.approx(after, abs=1e-6)
    assert after == pytest.approx(1.0, abs=1e-6)


def test_wsd_rises_stays_and_falls():
    values = [wsd(i / 1000, warmup=0.1, decay=0.3, final=0.2) for i in range(1001)]
    assert values[0] == 0.0
    assert values[:101] == sorted(values[:101])
    assert set(values[100:701]) == {1.0}
    assert values[700:] == sorted(values[700:], reverse=True)
    assert values[-1] == pytest.approx(0.2)


def test_cosine_is_half_way_down_in_the_middle_of_its_decay():
    assert cosine(0.05, warmup=0.1, final=0.2) == pytest.approx(0.5)
    assert cosine(0.1, warmup=0.1, final=0.2) == 1.0
    assert cosine(0.55, warmup=0.1, final=0.2) == pytest.approx(0.6)
    assert cosine(0.775, warmup=0.1, final=0.2) == pytest.approx(0.2 + 0.4 * (1 + math.cos(0.75 * math.pi)))
    assert cosine(1.0, warmup=0.1, final=0.2) == pytest.approx(0.2)


@pytest.mark.parametrize("name", ["wsd", "cosine", "constant"])
def test_progress_outside_the_budget_is_clamped(name):
    schedule = build_schedule(ScheduleConfig(name=name))
    assert schedule(-1.0) == schedule(0.0) == 0.0
    assert schedule(2.0) == schedule(1.0)


@pytest.mark.parametrize("name", ["wsd", "cosine", "constant"])
def test_no_warmup_and_no_decay_need_no_special_care(name):
    schedule = build_schedule(ScheduleConfig(name=name, warmup=0.0, decay=0.0))
    assert schedule(0.0) == 1.0
    assert schedule(1.0) == pytest.approx({"wsd": 1.0, "cosine": 0.1, "constant": 1.0}[name])


def test_a_schedule_that_is_all_warmup_ends_at_the_peak():
    assert cosine(1.0, warmup=1.0, final=0.1) == 1.0
    assert wsd(1.0, warmup=1.0, decay=0.0, final=0.1) == 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "wds"}, "did you mean 'wsd'"),
        ({"warmup": -0.1}, "schedule.warmup is -0.1"),
        ({"final": 1.1}, "schedule.final is 1.1"),
        ({"warmup": 0.8, "decay": 0.3}, "add up to more than 1"),
    ],
)
def test_impossible_schedules_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        ScheduleConfig(**fields)
