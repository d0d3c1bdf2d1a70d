"""A collaborative model: who is bought from next, after whom, counted in the training rows. It reads no text.

Over N valid names, labels that are no such name left out:

    popular(n)   = (rows with label n + 1) / (rows + N)
    after(n | r) = rows with label n whose user had bought from r / rows whose user had bought from r
    P(n | user)  = popular(n) / 2 + mean over the user's known r of after(n | r) / 2; popular(n) alone without one

Ours; D3 takes a trained sequential recommender in its place.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_ads.data.rows import ChatRow
from megatron_ads.evaluation.name_answers import bought_from
from megatron_ads.metrics.ranking import same_name


class CollaborativeModel:
    """Counts of training rows."""

    def __init__(self, training: Iterable[ChatRow]) -> None:
        """Count labels, and labels after each name that the user had bought from."""
        self._popular: Counter[str] = Counter()
        self._after: dict[str, Counter[str]] = defaultdict(Counter)
        for row in training:
            if row.label is not None:
                label = same_name(row.label)
                self._popular[label] += 1
                for past in _past(row):
                    self._after[past][label] += 1

    def chances(self, row: ChatRow, names: Sequence[str]) -> NDArray[np.float64]:
        """Return the probability of each of ``names``, (N,); all are above 0 and their sum is 1."""
        keys = [same_name(name) for name in names]
        popular_N = _counts(self._popular, keys) + 1
        popular_N /= popular_N.sum()
        after = [_counts(self._after[past], keys) for past in _past(row) if past in self._after]
        known = [counts_N / counts_N.sum() for counts_N in after if counts_N.any()]
        if not known:
            return popular_N
        chances_N: NDArray[np.float64] = (popular_N + np.mean(known, axis=0)) / 2
        return chances_N


def _past(row: ChatRow) -> dict[str, None]:
    return dict.fromkeys(same_name(name) for name in bought_from(row))


def _counts(counted: Counter[str], keys: Sequence[str]) -> NDArray[np.float64]:
    return np.asarray([counted[key] for key in keys], dtype=np.float64)
