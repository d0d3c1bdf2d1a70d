"""Bootstrap intervals against the normal approximation, and what drawing whole groups changes."""

import numpy as np
import pytest

from megatron_ads.metrics.classification import balanced_accuracy_interval
from megatron_ads.metrics.intervals import mean_and_interval, mean_interval, statistic_interval
from megatron_ads.tasks.relevance import BAD_VIEW


def test_the_interval_of_a_mean_is_about_two_standard_errors_wide():
    # 400 zeros and ones, half of each: standard error sqrt(0.25 / 400) = 0.025, so 0.5 +- 1.96 * 0.025 = [0.451, 0.549]
    interval = mean_interval([0.0, 1.0] * 200)
    assert interval is not None
    assert interval.low == pytest.approx(0.451, abs=0.006)
    assert interval.high == pytest.approx(0.549, abs=0.006)
    assert interval.confidence == 0.95


def test_rows_of_a_group_are_drawn_together():
    # Ten groups of forty equal rows are ten independent values: standard error sqrt(0.25 / 10) = 0.158.
    values = [float(row // 40 % 2) for row in range(400)]
    together = mean_interval(values, groups=[row // 40 for row in range(400)])
    alone = mean_interval(values)
    assert together is not None and alone is not None
    assert together.high - together.low == pytest.approx(2 * 1.96 * 0.158, rel=0.12)
    assert together.high - together.low > 4 * (alone.high - alone.low)


def test_groups_of_unlike_size_weigh_by_their_rows():
    # A group of 1 row with 1.0 and two groups of rows with 0.0: of 27 resamples, 1 has the first alone and 8 lack it.
    interval = mean_interval([1.0] + [0.0] * 99, groups=["a"] + ["b"] * 49 + ["c"] * 50)
    assert interval is not None
    assert (interval.low, interval.high) == (0.0, 1.0)


def test_any_statistic_gives_the_same_interval_as_the_mean():
    values = np.arange(100) / 100
    mean = mean_interval(values.tolist(), resamples=2000)
    same = statistic_interval(lambda rows: float(values[rows].mean()), 100, resamples=2000, seed=1)
    assert mean is not None and same is not None
    # Both estimate 0.495 +- 1.96 * 0.2887 / 10 = +- 0.0566.
    assert (same.low, same.high) == (pytest.approx(mean.low, abs=0.01), pytest.approx(mean.high, abs=0.01))


def test_a_statistic_may_be_undefined_in_some_resamples_but_not_in_all():
    only_where_first = statistic_interval(lambda rows: 1.0 if 0 in rows else None, 3)
    assert only_where_first is not None and only_where_first.low == 1.0
    assert statistic_interval(lambda rows: None, 3) is None
    assert mean_interval([]) is None
    assert mean_and_interval([]) == {"value": None, "interval": None}
    assert statistic_interval(lambda rows: 1.0, 0) is None


@pytest.mark.parametrize("groups", [["a"] * 6, ["a", "b"] * 3])
def test_one_or_two_groups_show_nothing_of_the_others(groups: list[str]):
    assert mean_interval([0.5] * 6, groups=groups) is None
    assert statistic_interval(lambda rows: 0.5, 6, groups=groups) is None
    assert balanced_accuracy_interval(["Bad", "Good"] * 3, ["Bad", "Good"] * 3, BAD_VIEW, groups=groups) is None
    assert mean_interval([0.5] * 6, groups=["a", "b", "c"] * 2) is not None


def test_the_seed_decides():
    values = [0.0, 1.0, 5.0, 7.0, 2.0]
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)
    assert mean_interval(values, seed=1, resamples=50) != mean_interval(values, seed=2, resamples=50)
