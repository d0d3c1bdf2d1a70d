"""How well rankings find the one item that came next.

With r the position of the truth in a ranking (1 is first, repeated entries removed, None if it is not there):

    recall@k = HR@k = share of rows with r <= k        MRR = mean of 1 / r, 0 where r is None
    NDCG@k = mean of 1 / log2(1 + r) for r <= k, else 0: with one relevant item the best order has DCG 1
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean

RECALLS = (1, 5, 20)
HIT_RATES = (1, 5, 10, 20, 50, 100)


def mean(values: Sequence[float]) -> float | None:
    """Return the mean, or of booleans the share that is true; None without values."""
    return fmean(values) if values else None


def same_name(name: str) -> str:
    """Return the form in which names are compared: case and white space do not count."""
    return " ".join(name.casefold().split())


def position_of(truth: str, ranking: Iterable[str]) -> int | None:
    """Return the position of ``truth``, from 1; entries that repeat an earlier one take no place."""
    wanted = same_name(truth)
    for position, name in enumerate(dict.fromkeys(same_name(name) for name in ranking), 1):
        if name == wanted:
            return position
    return None


def recall_at(positions: Sequence[int | None], k: int) -> float | None:
    """Return the share of rows whose truth is among the first ``k``; None without rows."""
    return mean([float(position is not None and position <= k) for position in positions])


def reciprocal_rank(positions: Sequence[int | None]) -> float | None:
    """Return the mean reciprocal rank; None without rows."""
    return mean([1 / position if position is not None else 0.0 for position in positions])


def ndcg_at(positions: Sequence[int | None], k: int) -> float | None:
    """Return the mean NDCG of rows with one relevant item; None without rows."""
    return mean(
        [1 / math.log2(1 + position) if position is not None and position <= k else 0.0 for position in positions]
    )


def distinct_rate(rankings: Sequence[Sequence[str]]) -> float | None:
    """Return the share of entries that do not repeat an earlier entry of their ranking; None without entries."""
    entries = sum(len(ranking) for ranking in rankings)
    distinct = sum(len({same_name(name) for name in ranking}) for ranking in rankings)
    return distinct / entries if entries else None


def valid_rate(rankings: Sequence[Sequence[str]], valid: Iterable[str]) -> float | None:
    """Return the share of entries that name something that exists; None without entries."""
    known = {same_name(name) for name in valid}
    return mean([float(same_name(name) in known) for ranking in rankings for name in ranking])


def most_popular(labels: Iterable[str], k: int) -> list[str]:
    """Return the baseline that ranks by frequency among training labels; of equally frequent ones the first by name."""
    counts = Counter(labels)
    return sorted(counts, key=lambda name: (-counts[name], name))[:k]


def recent_then_popular(recent: Sequence[str], popular: Sequence[str], k: int) -> list[str]:
    """Return the baseline that repeats what a user had, newest first, and continues with what is popular."""
    return list(dict.fromkeys([*recent, *popular]))[:k]
