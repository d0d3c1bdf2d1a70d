"""How well graded labels are told apart, as the binary tables of AdNanny (section 5.1, tables 1 to 4) have it.

A view calls some labels a defect (the negative class), the others not (the positive class). With the counts

    TP, FN, UP   non-defects answered as non-defect, as defect, and not readably
    TN, FP, UN   defects answered as defect, as non-defect, and not readably

    PosAcc  = TP / (TP + FN + UP)     NegAcc  = TN / (TN + FP + UN)     BACC = (PosAcc + NegAcc) / 2
    PosPrec = TP / (TP + FP)          NegPrec = TN / (TN + FN)          Acc  = (TP + TN) / all
    DR      = defects / all           Model DR = (TN + FN) / all        F1   = 2 / (1/Prec + 1/Acc of the class)

An answer that cannot be read is wrong whatever the truth is, and counts as neither prediction (ours; the paper does not
say). A ratio with denominator 0 is undefined: None.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from megatron_ads.metrics.intervals import Interval


@dataclass(frozen=True, slots=True)
class DefectView:
    """Which labels of a graded scale are a defect."""

    name: str
    defects: frozenset[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class BinaryMetrics:
    """One line of the paper's tables, as fractions; None is undefined."""

    rows: int
    defect_rate: float | None
    model_defect_rate: float | None
    balanced_accuracy: float | None
    accuracy: float | None
    positive_accuracy: float | None
    positive_precision: float | None
    negative_accuracy: float | None
    negative_precision: float | None
    positive_f1: float | None
    negative_f1: float | None
    unreadable_rate: float | None

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the fields by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, slots=True)
class _Counts:
    """TP, FN, UP, TN, FP, UN of the module's head."""

    tp: int = 0
    fn: int = 0
    up: int = 0
    tn: int = 0
    fp: int = 0
    un: int = 0


def binary_metrics(truths: Sequence[str], predictions: Sequence[str | None], view: DefectView) -> BinaryMetrics:
    """Score predictions in one view; None is an answer that could not be read."""
    c = _count(truths, predictions, view)
    total = len(truths)
    positive_accuracy, negative_accuracy = _ratio(c.tp, c.tp + c.fn + c.up), _ratio(c.tn, c.tn + c.fp + c.un)
    positive_precision, negative_precision = _ratio(c.tp, c.tp + c.fp), _ratio(c.tn, c.tn + c.fn)
    return BinaryMetrics(
        rows=total,
        defect_rate=_ratio(c.tn + c.fp + c.un, total),
        model_defect_rate=_ratio(c.tn + c.fn, total),
        balanced_accuracy=_mean(positive_accuracy, negative_accuracy),
        accuracy=_ratio(c.tp + c.tn, total),
        positive_accuracy=positive_accuracy,
        positive_precision=positive_precision,
        negative_accuracy=negative_accuracy,
        negative_precision=negative_precision,
        positive_f1=_f1(positive_precision, positive_accuracy),
        negative_f1=_f1(negative_precision, negative_accuracy),
        unreadable_rate=_ratio(c.up + c.un, total),
    )


def majority_predictions(truths: Sequence[str], *, learned_from: Sequence[str] | None = None) -> list[str | None]:
    """Return the baseline that answers every row with the most frequent label, of ``learned_from`` if given.

    Where several are equally frequent it is the first in the alphabet.
    """
    counts = Counter(learned_from or truths)
    majority = min(counts, key=lambda label: (-counts[label], label))
    return [majority] * len(truths)


def balanced_accuracy_interval(
    truths: Sequence[str],
    predictions: Sequence[str | None],
    view: DefectView,
    *,
    groups: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval | None:
    """Bootstrap the balanced accuracy over rows, or over ``groups`` of rows that belong together, such as queries.

    Returns:
        None if no resample had both classes.
    """
    counts_GK = _counts_by_group(truths, predictions, view, groups or range(len(truths)))
    draw = np.random.default_rng(seed)
    clusters = len(counts_GK)
    times_RG = draw.multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples)
    right_positive, positives, right_negative, negatives = (times_RG @ counts_GK).T
    defined = (positives > 0) & (negatives > 0)
    if not defined.any():
        return None
    values = (right_positive[defined] / positives[defined] + right_negative[defined] / negatives[defined]) / 2
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(low=float(low), high=float(high), confidence=confidence)


def _counts_by_group(
    truths: Sequence[str], predictions: Sequence[str | None], view: DefectView, groups: Sequence[Hashable]
) -> NDArray[np.int64]:
    """Return, per group, (TP, non-defects, TN, defects)."""
    index = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    counts_GK = np.zeros((len(index), 4), dtype=np.int64)
    for truth, prediction, group in zip(truths, predictions, groups, strict=True):
        defect = truth in view.defects
        right = prediction is not None and (prediction in view.defects) == defect
        counts_GK[index[group], 2 * defect] += right
        counts_GK[index[group], 2 * defect + 1] += 1
    return counts_GK


def _count(truths: Sequence[str], predictions: Sequence[str | None], view: DefectView) -> _Counts:
    found: Counter[str] = Counter()
    for truth, prediction in zip(truths, predictions, strict=True):
        defect = truth in view.defects
        if prediction is None:
            found["un" if defect else "up"] += 1
        elif prediction in view.defects:
            found["tn" if defect else "fn"] += 1
        else:
            found["fp" if defect else "tp"] += 1
    return _Counts(**found)


def _ratio(numerator: int, denominator: int) -> float | None:
    return numerator / denominator if denominator else None


def _mean(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else (first + second) / 2


def _f1(precision: float | None, recall: float | None) -> float | None:
    """Harmonic mean; 0 if both are 0, undefined if either is."""
    if precision is None or recall is None:
        return None
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
