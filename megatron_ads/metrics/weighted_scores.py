"""Metrics of probabilities in which each row counts as often as a resample drew it: sorted once for all resamples.

With rows in falling order of probability, w how often a row counts and y whether it is positive:

    TP = cumulated w y,  FP = cumulated w (1 - y), at the last row of each distinct probability
    AUC    = sum dFP (TP_before + TP) / 2 / (P N)          P, N: all positives, all negatives
    PR-AUC = sum dTP / P * TP / (TP + FP)
    loss   = -sum w log p(what happened) / sum w

With w = 1 everywhere they are ``auc``, ``average_precision`` and ``log_loss`` of ``classification``.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
METRICS = ("loss", "auc", "pr_auc")


class SortedRows:
    """N rows with a probability each, in falling order of it."""

    def __init__(self, truths: Sequence[bool] | NDArray[Any], probabilities: Sequence[float] | Numbers) -> None:
        truth_N, p_N = np.asarray(truths, dtype=bool), np.asarray(probabilities, dtype=np.float64)
        self.count = len(p_N)
        self._order = np.argsort(-p_N, kind="stable")
        self._truth_N, p_N = truth_N[self._order], p_N[self._order]
        self._last_of_p = np.append(p_N[1:] != p_N[:-1], [True])[: len(p_N)]
        clipped_N = p_N.clip(1e-7, 1 - 1e-7)
        self._loss_N = -np.log(np.where(self._truth_N, clipped_N, 1 - clipped_N))

    def metrics(self, weight_N: NDArray[Any]) -> Numbers:
        """Return (3,), ``METRICS``, with how often each row counts, in the order given; NaN where undefined."""
        weight_N = weight_N[self._order]
        hits = np.cumsum(weight_N * self._truth_N)[self._last_of_p].astype(np.float64)
        rows = np.cumsum(weight_N)[self._last_of_p].astype(np.float64)
        if not len(rows) or rows[-1] == 0:
            return np.full(len(METRICS), np.nan)
        misses, positives, negatives = rows - hits, hits[-1], rows[-1] - hits[-1]
        gained, lost = np.diff(hits, prepend=0.0), np.diff(misses, prepend=0.0)
        area, precision = (lost * (hits - gained / 2)).sum(), (gained * hits / np.maximum(rows, 1e-300)).sum()
        return np.array([
            (weight_N * self._loss_N).sum() / rows[-1],
            area / (positives * negatives) if positives and negatives else np.nan,
            precision / positives if positives else np.nan,
        ])  # fmt: skip
