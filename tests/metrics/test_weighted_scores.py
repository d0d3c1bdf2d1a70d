"""Weighted metrics are those of the rows repeated."""

import numpy as np
import pytest

from megatron_ads.metrics.classification import auc, average_precision, log_loss
from megatron_ads.metrics.weighted_scores import SortedRows


def test_a_weight_counts_as_so_many_equal_rows_ties_included() -> None:
    draw = np.random.default_rng(0)
    p = draw.integers(20, size=300) / 20  # many ties
    truth = draw.random(300) < p
    weights = draw.integers(4, size=300)
    rows = SortedRows(truth, p)
    for times in (np.ones(300, dtype=int), weights):
        repeated_truth, repeated_p = np.repeat(truth, times), np.repeat(p, times)
        wanted = [metric(repeated_truth, repeated_p) for metric in (log_loss, auc, average_precision)]
        assert rows.metrics(times) == pytest.approx(wanted, rel=1e-12)
    assert rows.metrics(weights) != pytest.approx(rows.metrics(np.ones(300, dtype=int)), rel=1e-3)


def test_what_is_undefined_is_no_number() -> None:
    rows = SortedRows([True, True, False], [0.9, 0.8, 0.1])
    assert np.isnan(rows.metrics(np.zeros(3))).all()
    loss, area, precision = rows.metrics(np.array([1, 1, 0]))
    assert loss == pytest.approx(-np.log([0.9, 0.8]).mean()) and np.isnan(area) and precision == 1
    assert np.isnan(SortedRows([], []).metrics(np.zeros(0))).all()
