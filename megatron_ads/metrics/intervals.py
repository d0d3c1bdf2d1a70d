"""Bootstrap intervals: how different a number could have been, had other rows been drawn.

Rows that belong together, such as the rows of one query or user, are drawn together: they are not independent. The
interval is between two percentiles of the resampled values. One or two groups show nothing of how others differ: they
have none.

Shape suffixes: N = rows, G = groups, R = resamples, K = columns.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEAST_GROUPS = 3


@dataclass(frozen=True, slots=True)
class Interval:
    """Percentile bootstrap interval."""

    low: float
    high: float
    confidence: float = 0.95


def mean_interval(
    values: Sequence[float], *, groups: Sequence[Hashable] | None = None, resamples: int = 2000, seed: int = 0
) -> Interval | None:
    """Bootstrap the mean over rows. For two models on the same rows, give the differences of their values.

    Returns:
        None without rows, or with fewer than ``LEAST_GROUPS``.
    """
    if not values:
        return None
    sums_R, rows_R = resampled_sums([values, np.ones(len(values))], groups=groups, resamples=resamples, seed=seed)
    return percentile_interval(sums_R / rows_R)


def resampled_sums(
    columns: Sequence[Sequence[float] | NDArray[np.float64]],
    *,
    groups: Sequence[Hashable] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Return (K, R): the sum of each column of N values over the rows of each resample; R is 0 with too few groups."""
    numbers = _numbered(groups or range(len(columns[0])))
    clusters = int(numbers.max()) + 1
    sums_KG = [
        np.bincount(numbers, weights=np.asarray(column, dtype=np.float64), minlength=clusters) for column in columns
    ]
    draw, evenly = np.random.default_rng(seed), np.full(clusters, 1 / clusters)
    sums_KR = np.empty((len(columns), resamples if clusters >= LEAST_GROUPS else 0))
    for resample in range(sums_KR.shape[1]):  # one at a time: all together would take resamples x groups numbers
        times_G = draw.multinomial(clusters, evenly)
        sums_KR[:, resample] = [times_G @ sums_G for sums_G in sums_KG]
    return sums_KR


def statistic_interval(
    statistic: Callable[[NDArray[np.int64]], float | None],
    rows: int,
    *,
    groups: Sequence[Hashable] | None = None,
    resamples: int = 500,
    seed: int = 0,
) -> Interval | None:
    """Bootstrap any statistic of the numbers of the drawn rows, with repetitions; rows of one group are drawn together.

    Returns:
        None if the statistic was undefined in every resample, or there are fewer than ``LEAST_GROUPS``.
    """
    found = [statistic(drawn) for drawn in resampled_rows(rows, groups=groups, resamples=resamples, seed=seed)]
    return percentile_interval(np.asarray([value for value in found if value is not None]))


def resampled_rows(
    rows: int, *, groups: Sequence[Hashable] | None = None, resamples: int = 500, seed: int = 0
) -> Iterator[NDArray[np.int64]]:
    """Yield the numbers of the rows of each resample, with repetitions; nothing with too few groups."""
    if rows == 0:
        return
    numbers = _numbered(groups or range(rows))
    members = [np.flatnonzero(numbers == number) for number in range(int(numbers.max()) + 1)]
    draw = np.random.default_rng(seed)
    for _ in range(resamples if len(members) >= LEAST_GROUPS else 0):
        chosen = draw.integers(len(members), size=len(members))
        yield np.concatenate([members[number] for number in chosen])


def resampled_counts(groups: Sequence[Hashable], *, resamples: int, seed: int = 0) -> Iterator[NDArray[np.int64]]:
    """Yield how often each row is in each resample; rows of one group are drawn together; nothing with too few."""
    numbers = _numbered(groups)
    clusters = len(set(groups))
    draw = np.random.default_rng(seed)
    for _ in range(resamples if clusters >= LEAST_GROUPS else 0):
        yield draw.multinomial(clusters, np.full(clusters, 1 / clusters))[numbers]


def mean_and_interval(values: Sequence[float], *, resamples: int = 2000) -> dict[str, Any]:
    """Return the mean over rows, ``value``, and its ``interval``, as JSON values; None where there is none."""
    interval = ends(mean_interval(values, resamples=resamples))
    return {"value": float(np.mean(values)) if values else None, "interval": interval}


def ends(interval: Interval | None) -> list[float] | None:
    """Return the interval as a JSON value."""
    return None if interval is None else [interval.low, interval.high]


def percentile_interval(values: NDArray[np.float64]) -> Interval | None:
    """Return the central interval that holds 95 % of resampled values; None without any."""
    if not values.size:
        return None
    low, high = np.quantile(values, [(1 - 0.95) / 2, (1 + 0.95) / 2])
    return Interval(low=float(low), high=float(high))


def _numbered(groups: Sequence[Hashable]) -> NDArray[np.int64]:
    """Return, per row, the number of its group."""
    index = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return np.asarray([index[group] for group in groups], dtype=np.int64)
