"""How well rankings find the one item that came next, or items of graded worth.

With r the position of the truth in a ranking (1 is first, repeated entries removed, None if it is not there):

    recall@k = HR@k = share of rows with r <= k        MRR = mean of 1 / r, 0 where r is None
    DCG@k  = sum over the first k of gain / log2(1 + position)        NDCG@k = DCG@k / DCG@k of the best order

With one relevant item, gain 1, NDCG@k is 1 / log2(1 + r) for r <= k. With several, recall@k is the share of them among
the first k, and a hit is at least one.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from statistics import fmean

RECALLS = (1, 5, 20)
HIT_RATES = (1, 5, 10, 20, 50, 100)


def same_name(name: str) -> str:
    """Return the form in which names are compared: case and white space do not count."""
    return " ".join(name.casefold().split())


def position_of(truth: str, ranking: Iterable[str]) -> int | None:
    """Return where ``truth`` stands, from 1; entries that repeat an earlier one take no place."""
    wanted = same_name(truth)
    for position, name in enumerate(dict.fromkeys(same_name(name) for name in ranking), 1):
        if name == wanted:
            return position
    return None


def recall_at(positions: Sequence[int | None], k: int) -> float | None:
    """Return the share of rows whose truth is among the first ``k``; None without rows."""
    return _mean([float(position is not None and position <= k) for position in positions])


def reciprocal_rank(positions: Sequence[int | None]) -> float | None:
    """Return the mean reciprocal rank; None without rows."""
    return _mean([1 / position if position is not None else 0.0 for position in positions])


def ndcg_at(positions: Sequence[int | None], k: int) -> float | None:
    """Return the mean NDCG of rows with one relevant item; None without rows."""
    return _mean([_discount(position) if position is not None and position <= k else 0.0 for position in positions])


def graded_ndcg(gains: Sequence[float], k: int) -> float | None:
    """Return the NDCG of one ranking whose items, in its order, are worth ``gains``; None if none is worth anything."""
    best = _dcg(sorted(gains, reverse=True), k)
    return _dcg(gains, k) / best if best else None


def recall_of(relevant: Collection[str], ranking: Sequence[str], k: int) -> float | None:
    """Return the share of several relevant items among the first ``k``; None if there are none."""
    first = list(dict.fromkeys(same_name(name) for name in ranking))[:k]
    wanted = {same_name(name) for name in relevant}
    return len(wanted & set(first)) / len(wanted) if wanted else None


def distinct_rate(rankings: Sequence[Sequence[str]]) -> float | None:
    """Return the share of entries that do not repeat an earlier entry of their ranking; None without entries."""
    entries = sum(len(ranking) for ranking in rankings)
    distinct = sum(len({same_name(name) for name in ranking}) for ranking in rankings)
    return distinct / entries if entries else None


def valid_rate(rankings: Sequence[Sequence[str]], valid: Iterable[str]) -> float | None:
    """Return the share of entries that name something that exists; None without entries."""
    known = {same_name(name) for name in valid}
    return _mean([float(same_name(name) in known) for ranking in rankings for name in ranking])


def category_accuracy(
    truths: Sequence[Sequence[str]], predictions: Sequence[Sequence[str] | None], level: int
) -> float | None:
    """Return the share of rows whose category path agrees down to ``level`` (1 is the top); None without rows.

    A path that ends above the level, or a missing prediction, disagrees.
    """
    agree = [
        prediction is not None and len(truth) >= level and [*truth[:level]] == [*prediction[:level]]
        for truth, prediction in zip(truths, predictions, strict=True)
    ]
    return _mean([float(value) for value in agree])


def most_popular(labels: Iterable[str], k: int) -> list[str]:
    """Return the baseline that ranks by frequency among training labels; of equally frequent ones the first by name."""
    counts = Counter(labels)
    return sorted(counts, key=lambda name: (-counts[name], name))[:k]


def recent_then_popular(recent: Sequence[str], popular: Sequence[str], k: int) -> list[str]:
    """Return the baseline that repeats what a user had, newest first, and goes on with what is popular."""
    return list(dict.fromkeys([*recent, *popular]))[:k]


def _discount(position: int) -> float:
    return 1 / math.log2(1 + position)


def _dcg(gains: Sequence[float], k: int) -> float:
    return sum(gain * _discount(position) for position, gain in enumerate(gains[:k], 1))


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
