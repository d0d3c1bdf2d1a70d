"""How well rankings find the one item that came next.

With r the position of the truth in a ranking (1 is first, repeated entries removed, None if it is not there):

    recall@k = HR@k = share of rows with r <= k        MRR = mean of 1 / r, 0 where r is None
    NDCG@k = mean of 1 / log2(1 + r) for r <= k, else 0: with one relevant item the best order has DCG 1
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean
from unicodedata import normalize

RECALLS = (1, 5, 20)
HIT_RATES = (1, 5, 10, 20, 50, 100)


def mean(values: Sequence[float]) -> float | None:
    """Return the mean, or of booleans the share that is true; None without values."""
    return fmean(values) if values else None


_IGNORABLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
"""Unicode's Default_Ignorable_Code_Point: what has no glyph, such as a zero-width space."""
_APOSTROPHE = re.compile("[`´‘’‛ʻʼ′]")


def same_name(name: str) -> str:
    """Return the form in which names, groups and prompts are compared, wherever they are.

    Case, width, composition, white space, invisible signs and the kind of an apostrophe do not count. Source: Unicode
    3.13, NFKC_Casefold; apostrophes and white space are ours.
    """
    name = _APOSTROPHE.sub("'", name)  # before NFKC, which makes a space and a combining sign of an acute accent
    if not name.isascii():
        name = normalize("NFKC", _IGNORABLE.sub("", name)).casefold()
        name = _APOSTROPHE.sub("'", normalize("NFKC", name)).replace("\u2010", "-")
    return " ".join(name.casefold().split())


def each_once(names: Iterable[str]) -> tuple[str, ...]:
    """Return names without those that repeat an earlier one, as the first is spelt; names of nothing are left out."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(same_name(name), name.strip())
    first.pop("", None)
    return tuple(first.values())


def position_of(truth: str, ranking: Iterable[str]) -> int | None:
    """Return the position of ``truth``, from 1; entries that repeat an earlier one take no place."""
    ranked = list(dict.fromkeys(map(same_name, ranking)))
    wanted = same_name(truth)
    return ranked.index(wanted) + 1 if wanted in ranked else None


def recall_at(positions: Sequence[int | None], k: int) -> float | None:
    """Return the share of rows whose truth is among the first ``k``; None without rows."""
    return mean([float(position is not None and position <= k) for position in positions])


def reciprocal_rank(positions: Sequence[int | None]) -> float | None:
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
    """Return the baseline that ranks by frequency among training labels; of equally frequent ones the first by name.

    Each name is there once, as it is spelt most often.
    """
    spellings: dict[str, Counter[str]] = defaultdict(Counter)
    for label in labels:
        spellings[same_name(label)][label] += 1
    ranked = sorted((-of_name.total(), _most_frequent(of_name)) for of_name in spellings.values())
    return [name for _, name in ranked[:k]]


def _most_frequent(counts: Counter[str]) -> str:
    return min(counts, key=lambda name: (-counts[name], name))


def recent_then_popular(recent: Sequence[str], popular: Sequence[str], k: int) -> list[str]:
    """Return the baseline that repeats what a user had, newest first, and continues with what is popular."""
    return list(each_once([*recent, *popular])[:k])
