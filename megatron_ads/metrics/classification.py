"""How well labels, scores and probabilities tell classes apart.

Binary views of graded labels, as the tables of AdNanny (section 5.1, tables 1 to 4) have them. A view calls some labels
a defect (the negative class), the others not (the positive class). With the counts

    TP, FN, UP   non-defects answered as non-defect, as defect, and not readably
    TN, FP, UN   defects answered as defect, as non-defect, and not readably

    PosAcc  = TP / (TP + FN + UP)     NegAcc  = TN / (TN + FP + UN)     BACC = (PosAcc + NegAcc) / 2
    PosPrec = TP / (TP + FP)          NegPrec = TN / (TN + FN)          Acc  = (TP + TN) / all
    DR      = defects / all           Model DR = (TN + FN) / all        F1   = 2 / (1/Prec + 1/Acc of the class)

Labels on an ordered scale:

    quadratic kappa = 1 - sum_ij w_ij O_ij / sum_ij w_ij E_ij,    w_ij = (i - j)^2

with O_ij the rows of truth i and prediction j, and E_ij what independent draws with the same margins would give.

Scores and probabilities:

    AUC = P(score of a positive > score of a negative) + P(equal) / 2
    PR-AUC = sum over distinct scores, from the highest, of precision * recall gained
    ECE = sum over bins of (share of rows) * |mean probability - share of positives|

An answer that cannot be read is wrong whatever the truth is: in a view it counts as neither prediction, on a scale as
the label farthest from the truth (ours; the paper does not say). A ratio with denominator 0 is undefined: None;
F1 is 0 where its precision alone is, as scikit-learn has it.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_ads.metrics.intervals import Interval, percentile_interval, resampled_sums


@dataclass(frozen=True, slots=True)
class DefectView:
    """Which labels of a graded scale are a defect."""

    name: str
    defects: frozenset[str]


def binary_metrics(
    truths: Sequence[str], predictions: Sequence[str | None], view: DefectView
) -> dict[str, float | None]:
    """Return one line of the paper's tables, as fractions; a prediction of None could not be read."""
    found = Counter(
        (truth in view.defects, None if prediction is None else prediction in view.defects)
        for truth, prediction in zip(truths, predictions, strict=True)
    )
    tp, fn, up = found[False, False], found[False, True], found[False, None]
    tn, fp, un = found[True, True], found[True, False], found[True, None]
    total = len(truths)
    positive_accuracy, negative_accuracy = _ratio(tp, tp + fn + up), _ratio(tn, tn + fp + un)
    positive_precision, negative_precision = _ratio(tp, tp + fp), _ratio(tn, tn + fn)
    both = None if positive_accuracy is None or negative_accuracy is None else positive_accuracy + negative_accuracy
    return {
        "rows": total,
        "defect_rate": _ratio(tn + fp + un, total),
        "model_defect_rate": _ratio(tn + fn, total),
        "balanced_accuracy": None if both is None else both / 2,
        "accuracy": _ratio(tp + tn, total),
        "positive_accuracy": positive_accuracy,
        "positive_precision": positive_precision,
        "negative_accuracy": negative_accuracy,
        "negative_precision": negative_precision,
        "positive_f1": _f1(positive_precision, positive_accuracy),
        "negative_f1": _f1(negative_precision, negative_accuracy),
        "unreadable_rate": _ratio(up + un, total),
    }


def in_view(truths: Sequence[str], predictions: Sequence[str | None], view: DefectView) -> dict[str, float | None]:
    """Return the binary metrics, the view's name in front of each."""
    return {f"{view.name}/{name}": value for name, value in binary_metrics(truths, predictions, view).items()}


def balanced_accuracy_interval(
    truths: Sequence[str],
    predictions: Sequence[str | None],
    view: DefectView,
    *,
    groups: Sequence[Hashable] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval | None:
    """Bootstrap the balanced accuracy over rows, or over ``groups`` of rows.

    Returns:
        None if no resample had both classes, or there are fewer than ``LEAST_GROUPS``.
    """
    defect_N = np.array([truth in view.defects for truth in truths])
    answer_N = np.array([None if answer is None else answer in view.defects for answer in predictions])
    right_N = answer_N == defect_N
    columns = [right_N & ~defect_N, ~defect_N, right_N & defect_N, defect_N]
    sums_KR = resampled_sums(columns, groups=groups, resamples=resamples, seed=seed)
    right_positive, positives, right_negative, negatives = sums_KR[:, (sums_KR[1] > 0) & (sums_KR[3] > 0)]
    values = (right_positive / positives + right_negative / negatives) / 2
    return percentile_interval(values)


def majority_predictions(truths: Sequence[str], *, learned_from: Sequence[str] | None = None) -> list[str | None]:
    """Return the most frequent label, of ``learned_from`` if given, for every row; of several the first by name."""
    counts = Counter(learned_from or truths)
    majority = min(counts, key=lambda label: (-counts[label], label))
    return [majority] * len(truths)


def accuracy(truths: Sequence[str], predictions: Sequence[str | None]) -> float | None:
    """Return the share of rows with exactly the right label; None without rows."""
    return _ratio(sum(truth == given for truth, given in zip(truths, predictions, strict=True)), len(truths))


def macro_recall(truths: Sequence[str], predictions: Sequence[str | None]) -> float | None:
    """Return the mean over labels of the share of their rows that is right; labels without rows do not count."""
    rows = Counter(truths)
    right = Counter(truth for truth, given in zip(truths, predictions, strict=True) if truth == given)
    return sum(right[label] / rows[label] for label in sorted(rows)) / len(rows) if rows else None


def quadratic_kappa(truths: Sequence[str], predictions: Sequence[str | None], scale: Sequence[str]) -> float | None:
    """Return Cohen's kappa with quadratic weights; ``scale`` lists the labels in order.

    1 is full agreement, 0 what chance gives; None without rows, or if there is only one label among all of them.
    """
    from sklearn.metrics import cohen_kappa_score  # here: importing it takes longer than a command's --help may

    truth_N, given_N = _places(truths, predictions, scale)
    if len({*truth_N.tolist(), *given_N.tolist()}) < 2:
        return None
    return float(cohen_kappa_score(given_N, truth_N, labels=range(len(scale)), weights="quadratic"))


def mean_distance(truths: Sequence[str], predictions: Sequence[str | None], scale: Sequence[str]) -> float | None:
    """Return by how many steps of the scale a prediction is off on average; None without rows."""
    truth_N, given_N = _places(truths, predictions, scale)
    return float(np.abs(truth_N - given_N).mean()) if len(truth_N) else None


def auc(truths: Sequence[bool], scores: Sequence[float]) -> float | None:
    """Return the area under the ROC curve; None unless both classes are there. Scores may be infinite.

    NaN stands for an answer that cannot be read: it ranks below all others of a positive, above all of a negative.
    """
    truth_N, score_N = np.asarray(truths, dtype=bool), np.asarray(scores, dtype=np.float64)
    score_N = np.where(np.isnan(score_N), np.where(truth_N, -np.inf, np.inf), score_N)
    positive, negative = score_N[truth_N], np.sort(score_N[~truth_N])
    below = sum(int(np.searchsorted(negative, positive, side=side).sum()) for side in ("left", "right"))
    return _ratio(below, 2 * len(positive) * len(negative))


def average_precision(truths: Sequence[bool], scores: Sequence[float]) -> float | None:
    """Return the area under the precision-recall curve, as a step function; None without a positive.

    The sum over distinct scores, from the highest, of precision times the recall that is gained, as scikit-learn's.
    """
    truth_N, score_N = np.asarray(truths, dtype=bool), np.asarray(scores, dtype=np.float64)
    if not truth_N.any():
        return None
    order = np.argsort(-score_N, kind="stable")
    score_N, truth_N = score_N[order], truth_N[order]
    last_of_score = np.append(score_N[1:] != score_N[:-1], [True])
    hits, rows = np.cumsum(truth_N)[last_of_score], np.flatnonzero(last_of_score) + 1
    return float((hits / rows * np.diff(hits, prepend=0)).sum() / hits[-1])


def log_loss(truths: Sequence[bool], probabilities: Sequence[float]) -> float | None:
    """Return the mean of -log p of what happened, in nats, p being at least 1e-7; None without rows."""
    truth_N, p_N = np.asarray(truths, dtype=bool), np.asarray(probabilities, dtype=np.float64).clip(1e-7, 1 - 1e-7)
    return float(-np.log(np.where(truth_N, p_N, 1 - p_N)).mean()) if len(truth_N) else None


@dataclass(frozen=True, slots=True)
class Bin:
    """Rows whose probability lies in one range."""

    rows: int
    mean_probability: float
    share_of_positives: float


def calibration_bins(truths: Sequence[bool], probabilities: Sequence[float], bins: int = 10) -> list[Bin]:
    """Return equally wide bins of probability, empty ones left out."""
    truth_N, p_N = np.asarray(truths, dtype=bool), np.asarray(probabilities, dtype=np.float64)
    number_N = np.minimum((p_N * bins).astype(np.int64), bins - 1)
    return [
        Bin(int(here.sum()), mean_probability=float(p_N[here].mean()), share_of_positives=float(truth_N[here].mean()))
        for here in (number_N == number for number in range(bins))
        if here.any()
    ]


def calibration_error(truths: Sequence[bool], probabilities: Sequence[float], bins: int = 10) -> float | None:
    """Return the expected calibration error; None without rows."""
    if not len(truths):
        return None
    return sum(
        found.rows / len(truths) * abs(found.mean_probability - found.share_of_positives)
        for found in calibration_bins(truths, probabilities, bins)
    )


def _places(
    truths: Sequence[str], predictions: Sequence[str | None], scale: Sequence[str]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where truths and predictions are on a scale; unreadable is the end farthest from the truth."""
    place = {label: number for number, label in enumerate(scale)}
    truth_N, last = np.array([place[truth] for truth in truths], dtype=np.int64), len(scale) - 1
    farthest_N = np.where(2 * truth_N >= last, 0, last)  # the lower one of two
    answers = zip(predictions, farthest_N.tolist(), strict=True)
    given = [far if prediction is None else place[prediction] for prediction, far in answers]
    return truth_N, np.array(given, dtype=np.int64)


def _ratio(numerator: int, denominator: int) -> float | None:
    return numerator / denominator if denominator else None


def _f1(precision: float | None, recall: float | None) -> float | None:
    """Harmonic mean, as 2 TP / (2 TP + FP + FN): 0 without a hit, undefined if nothing is or is called so."""
    if precision is None and recall is None:
        return None
    return 2 * precision * recall / (precision + recall) if precision and recall else 0.0
