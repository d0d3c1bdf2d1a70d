"""Labels, their views, scores and probabilities: by hand, against scikit-learn, and against the paper's arithmetic."""

import math
import random

import pytest
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    cohen_kappa_score,
    f1_score,
    mean_absolute_error,
    precision_score,
    recall_score,
    roc_auc_score,
)

from megatron_ads.metrics.classification import (
    DefectView,
    accuracy,
    auc,
    average_precision,
    balanced_accuracy_interval,
    binary_metrics,
    calibration_bins,
    calibration_error,
    macro_recall,
    majority_predictions,
    mean_distance,
    quadratic_kappa,
)
from megatron_ads.tasks.relevance import BAD_VIEW, FAIR_VIEW

TRUTHS = ["Good", "Good", "Fair", "Fair", "Bad", "Bad", "Bad", "Good"]
PREDICTIONS = ["Good", "Fair", "Good", "Bad", "Bad", "Fair", None, None]


def test_bad_view_by_hand():
    # Non-defects: rows 1-4 and 8. Answered non-defect: 1, 2, 3 -> TP 3; row 4 -> FN 1; row 8 unreadable.
    # Defects: rows 5-7. TN 1 (row 5), FP 1 (row 6), row 7 unreadable.
    m = binary_metrics(TRUTHS, PREDICTIONS, BAD_VIEW)
    assert m["rows"] == 8
    assert m["defect_rate"] == 3 / 8
    assert m["model_defect_rate"] == 2 / 8  # rows 4 and 5
    assert m["positive_accuracy"] == 3 / 5
    assert m["negative_accuracy"] == 1 / 3
    assert m["balanced_accuracy"] == pytest.approx((3 / 5 + 1 / 3) / 2)
    assert m["accuracy"] == 4 / 8
    assert m["positive_precision"] == 3 / 4
    assert m["negative_precision"] == 1 / 2
    assert m["positive_f1"] == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    assert m["negative_f1"] == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert m["unreadable_rate"] == 2 / 8


def test_fair_view_by_hand():
    # Non-defects: rows 1, 2, 8: TP 1, FN 1 (row 2), row 8 unreadable. Defects: rows 3-7: TN rows 4, 5, 6; FP row 3.
    m = binary_metrics(TRUTHS, PREDICTIONS, FAIR_VIEW)
    assert (m["positive_accuracy"], m["negative_accuracy"]) == (1 / 3, 3 / 5)
    assert (m["positive_precision"], m["negative_precision"]) == (1 / 2, 3 / 4)
    assert (m["defect_rate"], m["model_defect_rate"]) == (5 / 8, 4 / 8)


def test_agrees_with_scikit_learn_where_every_answer_is_readable():
    draw = random.Random(0)
    truths = [draw.choice(["Bad", "Fair", "Good"]) for _ in range(500)]
    predictions = [truth if draw.random() < 0.6 else draw.choice(["Bad", "Fair", "Good"]) for truth in truths]
    for view in (BAD_VIEW, FAIR_VIEW):
        y_true = [truth not in view.defects for truth in truths]
        y_pred = [prediction not in view.defects for prediction in predictions]
        m = binary_metrics(truths, predictions, view)
        assert m["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y_true, y_pred))
        assert m["positive_precision"] == pytest.approx(precision_score(y_true, y_pred))
        assert m["negative_accuracy"] == pytest.approx(recall_score(y_true, y_pred, pos_label=False))
        assert m["positive_f1"] == pytest.approx(f1_score(y_true, y_pred))
        assert m["negative_f1"] == pytest.approx(f1_score(y_true, y_pred, pos_label=False))


def test_the_papers_table_1_obeys_these_definitions():
    # Dataset A, bad view, AdNanny: rates 53.25 predicted at DR 56.62, PosAcc 81.25, NegAcc 79.74. On 10,000 rows:
    # 4338 non-defects of which 3525 are found; 5662 defects of which 4515 are found.
    truths = ["Good"] * 4338 + ["Bad"] * 5662
    predictions = ["Good"] * 3525 + ["Bad"] * 813 + ["Bad"] * 4515 + ["Good"] * 1147
    m = binary_metrics(truths, predictions, BAD_VIEW)
    printed = {"balanced_accuracy": 80.50, "accuracy": 80.40, "positive_precision": 75.40, "negative_precision": 84.80,
               "positive_f1": 78.18, "negative_f1": 82.10, "model_defect_rate": 53.25}  # fmt: skip
    for name, percent in printed.items():
        assert 100 * m[name] == pytest.approx(percent, abs=0.15), name


def test_what_cannot_be_divided_is_undefined_not_zero():
    m = binary_metrics(["Good", "Fair"], ["Good", "Good"], BAD_VIEW)  # no defect, and none predicted
    assert m["negative_accuracy"] is None
    assert m["negative_precision"] is None
    assert m["balanced_accuracy"] is None
    assert m["negative_f1"] is None
    assert m["positive_f1"] == 1.0
    empty = binary_metrics([], [], BAD_VIEW)
    assert empty["accuracy"] is None and empty["unreadable_rate"] is None


@pytest.mark.parametrize("said", [["Good"] * 4, ["Bad"] * 4])
def test_f1_is_zero_where_nothing_is_called_so_as_in_scikit_learn(said: list[str]):
    truths = ["Good", "Good", "Bad", "Good"]
    found = binary_metrics(truths, said, BAD_VIEW)
    for name, label in (("positive_f1", "Good"), ("negative_f1", "Bad")):
        assert found[name] == pytest.approx(f1_score(truths, said, pos_label=label))


def test_a_class_that_is_always_missed_has_f1_zero():
    m = binary_metrics(["Good", "Bad"], ["Bad", "Good"], BAD_VIEW)
    assert (m["positive_f1"], m["negative_f1"], m["balanced_accuracy"]) == (0.0, 0.0, 0.0)


def test_always_unreadable_is_worse_than_the_majority_baseline():
    truths = ["Bad", "Good", "Good", "Fair"]
    assert binary_metrics(truths, [None] * 4, BAD_VIEW)["balanced_accuracy"] == 0.0
    majority = majority_predictions(truths)
    assert majority == ["Good"] * 4
    assert binary_metrics(truths, majority, BAD_VIEW)["balanced_accuracy"] == 0.5


def test_the_majority_can_be_learned_from_other_rows():
    assert majority_predictions(["Good"] * 3, learned_from=["Bad", "Bad", "Good"]) == ["Bad"] * 3
    assert majority_predictions(["Good", "Bad"]) == ["Bad", "Bad"]  # a tie: alphabetical


def test_interval_covers_the_estimate_and_narrows_with_more_rows():
    truths = ["Good", "Bad"] * 50
    predictions = ["Good", "Bad"] * 40 + ["Bad", "Good"] * 10  # 80 % right in either class
    small = balanced_accuracy_interval(truths, predictions, BAD_VIEW)
    large = balanced_accuracy_interval(truths * 9, predictions * 9, BAD_VIEW)
    assert small is not None and large is not None
    assert small.low < 0.8 < small.high
    # The standard error of a mean of two proportions of 50 rows each: sqrt(0.8 * 0.2 / 50 / 2) = 0.04.
    assert small.high - small.low == pytest.approx(2 * 1.96 * 0.04, rel=0.15)
    assert large.high - large.low == pytest.approx((small.high - small.low) / 3, rel=0.15)


def test_interval_over_groups_is_wider_when_a_group_is_right_or_wrong_as_one():
    truths = ["Good", "Bad"] * 50
    groups = [row // 10 for row in range(100)]  # ten queries of ten rows
    opposite = {"Good": "Bad", "Bad": "Good"}
    predictions = [truth if group % 5 else opposite[truth] for truth, group in zip(truths, groups, strict=True)]
    rows = balanced_accuracy_interval(truths, predictions, BAD_VIEW)
    queries = balanced_accuracy_interval(truths, predictions, BAD_VIEW, groups=groups)
    assert rows is not None and queries is not None
    assert queries.high - queries.low > 2 * (rows.high - rows.low)


def test_interval_is_the_same_for_the_same_seed_and_undefined_with_one_class():
    first = balanced_accuracy_interval(TRUTHS, PREDICTIONS, BAD_VIEW, seed=3)
    assert first == balanced_accuracy_interval(TRUTHS, PREDICTIONS, BAD_VIEW, seed=3)
    assert balanced_accuracy_interval(["Good"] * 3, ["Good"] * 3, BAD_VIEW) is None


def test_a_view_is_any_set_of_labels():
    quality = DefectView("quality", frozenset({"low"}))
    assert binary_metrics(["low", "high"], ["low", "high"], quality)["balanced_accuracy"] == 1.0


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


def test_the_scale_agrees_with_scikit_learn():
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
        mean_distance(["4"], ["0"], SCALE)


ARE_POSITIVE = [True, False, True, False]
SCORES = [0.9, 0.8, 0.4, 0.4]


def test_auc_counts_ordered_pairs_and_half_of_the_ties():
    # Pairs (positive, negative): (0.9, 0.8) 1, (0.9, 0.4) 1, (0.4, 0.8) 0, (0.4, 0.4) 0.5 -> 2.5 / 4
    assert auc(ARE_POSITIVE, SCORES) == 2.5 / 4


def test_average_precision_adds_the_recall_that_each_score_gains():
    # 0.9: precision 1, recall 0 -> 1/2. 0.8: no gain. Both of 0.4 at once: precision 2/4, recall 1/2 -> 1.
    assert average_precision(ARE_POSITIVE, SCORES) == 1 / 2 + 1 / 2 * 2 / 4


def test_areas_agree_with_scikit_learn():
    draw = random.Random(0)
    truths = [draw.random() < 0.3 for _ in range(400)]
    scores = [round(min(max(draw.gauss(0.6 if truth else 0.4, 0.2), 0.01), 0.99), 2) for truth in truths]
    assert auc(truths, scores) == pytest.approx(roc_auc_score(truths, scores))
    assert average_precision(truths, scores) == pytest.approx(average_precision_score(truths, scores))


def test_what_has_one_class_only_is_undefined():
    assert auc([True, True], [0.1, 0.2]) is None
    assert average_precision([False, False], [0.1, 0.2]) is average_precision([], []) is None
    assert calibration_error([], []) is None


def test_infinite_scores_are_the_extremes():
    assert auc([True, False, False], [-math.inf, 0.0, math.inf]) == 0.0


@pytest.mark.parametrize(("truth", "expected"), [(True, 1 / 2), (False, 1 / 2)])
def test_a_score_that_is_no_number_is_wrong_whatever_the_truth_is(truth: bool, expected: float):
    assert auc([True, False, truth], [0.9, 0.1, math.nan]) == expected


def test_calibration_by_hand():
    # Bin [0.2, 0.3): 0.2 and 0.25, one positive: |0.225 - 0.5|. Bin [0.9, 1]: 0.9 and 1.0, both positive: |0.95 - 1|.
    truths, probabilities = [True, False, True, True], [0.2, 0.25, 0.9, 1.0]
    bins = calibration_bins(truths, probabilities)
    assert [found.rows for found in bins] == [2, 2]
    assert [found.share_of_positives for found in bins] == [0.5, 1.0]
    assert calibration_error(truths, probabilities) == pytest.approx(0.5 * 0.275 + 0.5 * 0.05)
