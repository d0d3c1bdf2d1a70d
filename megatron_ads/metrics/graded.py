"""How well labels on an ordered scale are given: agreement that counts how far off a label is.

    quadratic kappa = 1 - sum_ij w_ij O_ij / sum_ij w_ij E_ij,    w_ij = (i - j)^2

with O_ij the rows of truth i and prediction j, and E_ij what independent draws with the same margins would give.

An answer that cannot be read counts as the label farthest from the truth (ours), so that silence never pays.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def confusion(truths: Sequence[str], predictions: Sequence[str | None], scale: Sequence[str]) -> NDArray[np.int64]:
    """Return rows counted by truth (first axis) and prediction; the last column holds what could not be read."""
    place = {label: number for number, label in enumerate(scale)}
    counts_LP = np.zeros((len(scale), len(scale) + 1), dtype=np.int64)
    for truth, prediction in zip(truths, predictions, strict=True):
        counts_LP[place[truth], len(scale) if prediction is None else place[prediction]] += 1
    return counts_LP


def quadratic_kappa(truths: Sequence[str], predictions: Sequence[str | None], scale: Sequence[str]) -> float | None:
    """Return Cohen's kappa with quadratic weights; ``scale`` lists the labels in order.

    Returns:
        1 is full agreement, 0 what chance gives; None without rows, or if truth and prediction are one and the same
        label throughout.
    """
    observed_LL = _with_unreadable_farthest(confusion(truths, predictions, scale)).astype(np.float64)
    total = observed_LL.sum()
    if total == 0:
        return None
    expected_LL = np.outer(observed_LL.sum(1), observed_LL.sum(0)) / total
    steps_L = np.arange(len(scale))
    weights_LL = (steps_L[:, None] - steps_L[None, :]) ** 2
    by_chance = float((weights_LL * expected_LL).sum())
    return 1 - float((weights_LL * observed_LL).sum()) / by_chance if by_chance else None


def mean_distance(truths: Sequence[str], predictions: Sequence[str | None], scale: Sequence[str]) -> float | None:
    """Return by how many steps of the scale a prediction is off on average; None without rows."""
    counts_LL = _with_unreadable_farthest(confusion(truths, predictions, scale))
    total = int(counts_LL.sum())
    steps_L = np.arange(len(scale))
    distance_LL = np.abs(steps_L[:, None] - steps_L[None, :])
    return float((distance_LL * counts_LL).sum()) / total if total else None


def accuracy(truths: Sequence[str], predictions: Sequence[str | None]) -> float | None:
    """Return the share of rows with exactly the right label; None without rows."""
    right = [truth == prediction for truth, prediction in zip(truths, predictions, strict=True)]
    return sum(right) / len(right) if right else None


def macro_recall(truths: Sequence[str], predictions: Sequence[str | None]) -> float | None:
    """Return the mean over labels of the share of their rows that is right; labels without rows do not count."""
    labels = sorted(set(truths))
    pairs = list(zip(truths, predictions, strict=True))
    recalls = [
        sum(prediction == label for truth, prediction in pairs if truth == label) / truths.count(label)
        for label in labels
    ]
    return sum(recalls) / len(recalls) if recalls else None


def _with_unreadable_farthest(counts_LP: NDArray[np.int64]) -> NDArray[np.int64]:
    """Fold the last column of ``confusion`` into the label farthest from each truth, the lower one of two."""
    labels = len(counts_LP)
    folded_LL = counts_LP[:, :labels].copy()
    for truth in range(labels):
        farthest = 0 if truth >= labels - 1 - truth else labels - 1
        folded_LL[truth, farthest] += counts_LP[truth, labels]
    return folded_LL
