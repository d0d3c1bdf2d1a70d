"""AUC, PR-AUC, log-loss and calibration: by hand and against scikit-learn."""

import math
import random

import pytest
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.metrics import log_loss as sklearn_log_loss

from megatron_ads.metrics.probabilities import (
    auc,
    calibration_bins,
    calibration_error,
    log_loss,
    pr_auc,
    score_interval,
)

TRUTHS = [True, False, True, False]
SCORES = [0.9, 0.8, 0.4, 0.4]


def test_auc_counts_ordered_pairs_and_half_of_the_ties():
    # Pairs (positive, negative): (0.9, 0.8) 1, (0.9, 0.4) 1, (0.4, 0.8) 0, (0.4, 0.4) 0.5 -> 2.5 / 4
    assert auc(TRUTHS, SCORES) == 2.5 / 4


def test_pr_auc_by_hand():
    # Thresholds 0.9: 1 of 1 right, recall 1/2; 0.8: 1 of 2; 0.4: both at once, 2 of 4, recall 1.
    # 1/2 * 1 + 0 + 1/2 * 2/4 = 0.75
    assert pr_auc(TRUTHS, SCORES) == 0.75


def test_log_loss_by_hand():
    # -(ln 0.9 + ln 0.2 + ln 0.4 + ln 0.6) / 4
    assert log_loss(TRUTHS, SCORES) == pytest.approx(-math.log(0.9 * 0.2 * 0.4 * 0.6) / 4)


def test_agree_with_scikit_learn():
    draw = random.Random(0)
    truths = [draw.random() < 0.3 for _ in range(400)]
    scores = [round(min(max(draw.gauss(0.6 if truth else 0.4, 0.2), 0.01), 0.99), 2) for truth in truths]
    assert auc(truths, scores) == pytest.approx(roc_auc_score(truths, scores))
    assert pr_auc(truths, scores) == pytest.approx(average_precision_score(truths, scores))
    assert log_loss(truths, scores) == pytest.approx(sklearn_log_loss(truths, scores))


def test_what_has_one_class_only_is_undefined():
    assert auc([True, True], [0.1, 0.2]) is None
    assert pr_auc([False], [0.1]) is None
    assert log_loss([], []) is None and calibration_error([], []) is None


def test_a_certain_mistake_costs_much_but_not_infinitely():
    assert log_loss([True], [0.0]) == pytest.approx(-math.log(1e-15))


def test_infinite_scores_are_the_extremes():
    assert auc([True, False, False], [-math.inf, 0.0, math.inf]) == 0.0


def test_calibration_by_hand():
    # Bin [0.2, 0.3): 0.2 and 0.25, one positive: |0.225 - 0.5|. Bin [0.9, 1]: 0.9 and 1.0, both positive: |0.95 - 1|.
    truths, probabilities = [True, False, True, True], [0.2, 0.25, 0.9, 1.0]
    bins = calibration_bins(truths, probabilities)
    assert [found.rows for found in bins] == [2, 2]
    assert [found.share_of_positives for found in bins] == [0.5, 1.0]
    assert calibration_error(truths, probabilities) == pytest.approx(0.5 * 0.275 + 0.5 * 0.05)


def test_the_interval_of_an_auc_covers_it():
    truths, scores = TRUTHS * 25, [score + number / 1000 for number, score in enumerate(SCORES * 25)]
    value = auc(truths, scores)
    interval = score_interval(auc, truths, scores, resamples=200)
    assert value is not None and interval is not None
    assert interval.low < value < interval.high
    by_group = score_interval(auc, truths, scores, groups=[number // 25 for number in range(100)], resamples=200)
    assert by_group is not None and by_group != interval
