"""How well scores and probabilities separate two classes: AUC, PR-AUC, log-loss, calibration.

AUC      = P(score of a positive > score of a negative) + P(equal) / 2
PR-AUC   = average precision: sum over thresholds of (recall gained) * precision there
log-loss = mean of -log p(the truth), p clipped to [1e-15, 1 - 1e-15]
ECE      = sum over bins of (share of rows) * |mean probability - share of positives|
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_ads.metrics.intervals import Interval, statistic_interval

_SMALLEST = 1e-15


@dataclass(frozen=True, slots=True)
class Bin:
    """Rows whose probability lies in one range."""

    rows: int
    mean_probability: float
    share_of_positives: float


def auc(truths: Sequence[bool], scores: Sequence[float]) -> float | None:
    """Return the area under the ROC curve; None unless both classes are there. Scores may be infinite."""
    truth_N, score_N = np.asarray(truths, dtype=bool), np.asarray(scores, dtype=np.float64)
    positives = int(truth_N.sum())
    negatives = len(truth_N) - positives
    if not positives or not negatives:
        return None
    rank_sum = float(_mean_ranks(score_N)[truth_N].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def pr_auc(truths: Sequence[bool], scores: Sequence[float]) -> float | None:
    """Return the average precision; rows of equal score share one threshold. None without positives."""
    truth_N, score_N = np.asarray(truths, dtype=bool), np.asarray(scores, dtype=np.float64)
    if not truth_N.any():
        return None
    order = np.argsort(-score_N, kind="stable")
    found_N = np.cumsum(truth_N[order])
    last_of_threshold = np.append(np.flatnonzero(np.diff(score_N[order])), len(order) - 1)
    found_T = found_N[last_of_threshold]
    precision_T = found_T / (last_of_threshold + 1)
    return float((np.diff(found_T, prepend=0) * precision_T).sum() / found_N[-1])


def log_loss(truths: Sequence[bool], probabilities: Sequence[float]) -> float | None:
    """Return the mean negative log-likelihood in nats; None without rows."""
    if not len(truths):
        return None
    p_N = np.clip(np.asarray(probabilities, dtype=np.float64), _SMALLEST, 1 - _SMALLEST)
    return float(-np.log(np.where(np.asarray(truths, dtype=bool), p_N, 1 - p_N)).mean())


def calibration_bins(truths: Sequence[bool], probabilities: Sequence[float], bins: int = 10) -> list[Bin]:
    """Return equally wide bins of probability, empty ones left out."""
    truth_N, p_N = np.asarray(truths, dtype=bool), np.asarray(probabilities, dtype=np.float64)
    number_N = np.minimum((p_N * bins).astype(np.int64), bins - 1)
    chosen = [number_N == number for number in range(bins)]
    return [
        Bin(
            rows=int(here.sum()),
            mean_probability=float(p_N[here].mean()),
            share_of_positives=float(truth_N[here].mean()),
        )
        for here in chosen
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


def score_interval(
    measure: Callable[[Sequence[bool], Sequence[float]], float | None],
    truths: Sequence[bool],
    scores: Sequence[float],
    *,
    groups: Sequence[Hashable] | None = None,
    resamples: int = 500,
    seed: int = 0,
) -> Interval | None:
    """Bootstrap ``auc``, ``pr_auc`` or ``log_loss`` over rows or groups of rows."""
    truth_N, score_N = np.asarray(truths, dtype=bool), np.asarray(scores, dtype=np.float64)

    def drawn(rows_R: NDArray[np.int64]) -> float | None:
        return measure(truth_N[rows_R].tolist(), score_N[rows_R].tolist())

    return statistic_interval(drawn, len(truth_N), groups=groups, resamples=resamples, seed=seed)


def _mean_ranks(score_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ranks from 1; equal scores share the mean of theirs."""
    _, value_N, count_V = np.unique(score_N, return_inverse=True, return_counts=True)
    last_V = np.cumsum(count_V)
    mean_V: NDArray[np.float64] = last_V - (count_V - 1) / 2
    return mean_V[value_N]
