"""Agreement on an ordered scale: by hand and against scikit-learn."""

import random

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score, mean_absolute_error

from megatron_ads.metrics.graded import accuracy, confusion, macro_recall, mean_distance, quadratic_kappa

SCALE = ["0", "1", "2", "3"]


def test_quadratic_kappa_by_hand():
    # Truth 0 0 3 3, prediction 0 1 3 3. Observed: one row off by 1 -> sum w O = 1.
    # Margins: truth 0: 2, 3: 2; prediction 0: 1, 1: 1, 3: 2. Expected = product / 4:
    #   (0,0) 0.5 w 0, (0,1) 0.5 w 1, (0,3) 1 w 9, (3,0) 0.5 w 9, (3,1) 0.5 w 4, (3,3) 1 w 0
    #   sum w E = 0.5 + 9 + 4.5 + 2 = 16;  kappa = 1 - 1 / 16
    assert quadratic_kappa(["0", "0", "3", "3"], ["0", "1", "3", "3"], SCALE) == pytest.approx(15 / 16)


def test_an_unreadable_answer_counts_as_the_label_farthest_from_the_truth():
    truths = ["0", "1", "2", "3"]
    silent = [None] * 4
    farthest = ["3", "3", "0", "0"]
    assert quadratic_kappa(truths, silent, SCALE) == quadratic_kappa(truths, farthest, SCALE)
    assert mean_distance(truths, silent, SCALE) == (3 + 2 + 2 + 3) / 4
    assert accuracy(truths, silent) == 0.0


def test_agrees_with_scikit_learn():
    draw = random.Random(0)
    truths = [draw.choice(SCALE) for _ in range(300)]
    predictions = [truth if draw.random() < 0.5 else draw.choice(SCALE) for truth in truths]
    assert quadratic_kappa(truths, predictions, SCALE) == pytest.approx(
        cohen_kappa_score(truths, predictions, weights="quadratic")
    )
    assert mean_distance(truths, predictions, SCALE) == pytest.approx(
        mean_absolute_error([int(t) for t in truths], [int(p) for p in predictions])
    )
    assert macro_recall(truths, predictions) == pytest.approx(balanced_accuracy_score(truths, predictions))


def test_confusion_has_a_column_for_what_could_not_be_read():
    counts = confusion(["0", "0", "2"], ["1", None, "2"], SCALE)
    assert counts.shape == (4, 5)
    assert counts[0].tolist() == [0, 1, 0, 0, 1]
    assert counts[2].tolist() == [0, 0, 1, 0, 0]
    assert counts.sum() == 3


def test_undefined_is_none():
    assert quadratic_kappa([], [], SCALE) is None
    assert quadratic_kappa(["1", "1"], ["1", "1"], SCALE) is None  # chance would agree as well
    assert mean_distance([], [], SCALE) is None
    assert accuracy([], []) is None and macro_recall([], []) is None


def test_macro_recall_weighs_labels_evenly():
    # 0: 3 of 3 right, 1: 0 of 1 right -> (1 + 0) / 2, though 3 of 4 rows are right
    assert macro_recall(["0", "0", "0", "1"], ["0", "0", "0", "0"]) == 0.5
    assert accuracy(["0", "0", "0", "1"], ["0", "0", "0", "0"]) == 0.75


def test_a_label_off_the_scale_is_an_error_of_the_caller():
    with pytest.raises(KeyError):
        confusion(["4"], ["0"], SCALE)
    assert np.array_equal(confusion([], [], SCALE), np.zeros((4, 5)))
