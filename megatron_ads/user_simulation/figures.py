"""Agent4Rec's five figures of each recommender, and whether they order recommenders as the truth does.

    view ratio      ads looked at / ads shown           clicks        ads clicked on
    click ratio     ads clicked on / ads shown          exit page     number of the last page
    satisfaction    what the user said at the end, from 1 to 5

Each is of a visit, and averaged over users (arXiv:2310.10108, table 2, where items are watched and liked; its like
ratio fits likes / items shown). What is true of a recommender is computed without simulating anything:

    utility          mean over users of sum_i w_i * E_k[want(ad_i | k)] / sum_i w_i
                     w_i = attention ** (place on its page) * exp(-(pages before) / patience)
    next_conversion  mean over users of sum_i p(a_i) / log2(1 + i)

i are the places of its list, from 1. The first is what an average user gains from an ad that is looked at, for the
needs of the next session, with ranks weighed as users read (rank-biased precision, Moffat and Zobel, TOIS 2008); a user
who clicks reads on, which it knows nothing of. The second is the expected NDCG of the next conversion within a week,
drawn by the world's p(a); it knows nothing of how users read.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau

from megatron_ads.config.user_simulation import BrowseConfig
from megatron_ads.metrics.intervals import ends, percentile_interval, resampled_rows
from megatron_ads.user_simulation.browsing import Visit
from megatron_ads.user_simulation.recommenders import Ranking
from megatron_ads.user_simulation.reports import score_of

FIGURES = ("view_ratio", "clicks", "click_ratio", "exit_page", "satisfaction")
TRUTHS = ("utility", "next_conversion")
_TAU_RESAMPLES = 200


def rank_biased_weights(config: BrowseConfig, places: int) -> NDArray[np.float64]:
    """Return (L,): the weight of each place of a list, 1 in sum."""
    page_L, place_L = np.divmod(np.arange(places), config.page_size)
    weight_L = config.user.attention**place_L * np.exp(-page_L / config.user.patience)
    share_L: NDArray[np.float64] = weight_L / weight_L.sum()
    return share_L


def true_values(
    ranking: Ranking, ad_UL: NDArray[np.int64], chance_UA: NDArray[np.float64], want_UD: NDArray[np.float64],
    config: BrowseConfig,
) -> dict[str, NDArray[np.float64]]:  # fmt: skip
    """Return what is true of one recommender, (U,) each.

    Args:
        ranking: Advertisers in its order.
        ad_UL: The ads that would be shown of them.
        chance_UA: True probability of each advertiser to be converted with next.
        want_UD: How much each user wants each ad on average over needs.
        config: How users read.
    """
    return {
        "utility": np.take_along_axis(want_UD, ad_UL, axis=1) @ rank_biased_weights(config, ranking.shape[1]),
        "next_conversion": expected_ndcg(ranking, chance_UA),
    }


def expected_ndcg(ranking: Ranking, chance_UA: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (U,): the expected NDCG of each user's next conversion, given its true probabilities."""
    discount_L = 1 / np.log2(2 + np.arange(ranking.shape[1]))
    ndcg_U: NDArray[np.float64] = np.take_along_axis(chance_UA, ranking, axis=1) @ discount_L
    return ndcg_U


@dataclass(frozen=True, slots=True)
class Measured:
    """What was seen of recommenders, and what is true of them; U users each."""

    by_recommender: Mapping[str, Mapping[str, NDArray[np.float64]]]
    """Each figure and truth, (U,); NaN where a user said nothing that could be read."""
    unreadable: Mapping[str, Mapping[str, int]]
    """Visits of each recommender that ended with an answer that could not be read, by the reason."""


def measure(visits: Sequence[Visit], truths: Mapping[str, Mapping[str, NDArray[np.float64]]]) -> Measured:
    """Return the figures of every visit, by recommender and user; ``truths`` are those of each recommender."""
    found = {
        name: {figure: np.full(len(of_one["utility"]), np.nan) for figure in FIGURES} | dict(of_one)
        for name, of_one in truths.items()
    }
    unreadable: dict[str, Counter[str]] = {name: Counter() for name in truths}
    for visit in visits:
        if (reason := visit.answers[-1].unreadable) is not None:
            unreadable[visit.recommender][reason] += 1
        for figure, value in _of_visit(visit).items():
            found[visit.recommender][figure][visit.user] = value
    return Measured(found, unreadable)


def _of_visit(visit: Visit) -> dict[str, float]:
    """Return the figures of a visit; of one that ended unreadably, those of the pages before that."""
    read = [answer for answer in visit.answers if answer.unreadable is None]
    shown = sum(len(page) for page in visit.shown[: len(read)])
    if not read:
        return {}
    said = [answer.satisfaction for answer in read if answer.satisfaction is not None]
    clicks = sum(len(answer.clicked) for answer in read)
    return {
        "view_ratio": sum(len(answer.looked) for answer in read) / shown,
        "clicks": clicks,
        "click_ratio": clicks / shown,
        "exit_page": len(read),
        **({"satisfaction": said[-1]} if said else {}),
    }


def averages(measured: Measured) -> dict[str, dict[str, Any]]:
    """Return, by recommender, each figure and truth with its bootstrap interval over users, as JSON values."""
    return {
        name: {figure: _average(value_U) for figure, value_U in of_one.items()}
        for name, of_one in measured.by_recommender.items()
    }


def _average(value_U: NDArray[np.float64]) -> dict[str, Any]:
    known = value_U[~np.isnan(value_U)].tolist()
    return {**score_of(known), "users": len(known)}


def agreement(measured: Measured, names: Sequence[str], truth: str) -> dict[str, dict[str, Any]]:
    """Return Kendall's tau-b between each figure and a truth over some recommenders, with its interval over users.

    A resample draws users, and computes figures and truth anew. None: it is undefined, as of a figure that is the same
    for all recommenders.
    """
    taus: dict[str, dict[str, Any]] = {}
    truth_NU = np.stack([measured.by_recommender[name][truth] for name in names])
    for figure in FIGURES:
        value_NU = np.stack([measured.by_recommender[name][figure] for name in names])
        drawn = [
            tau for rows in resampled_rows(truth_NU.shape[1], resamples=_TAU_RESAMPLES)
            if (tau := _tau(value_NU[:, rows], truth_NU[:, rows])[0]) is not None
        ]  # fmt: skip
        tau, p_value = _tau(value_NU, truth_NU)
        taus[figure] = {"tau": tau, "interval": ends(percentile_interval(np.array(drawn))), "p_value": p_value}
    return taus


def _tau(value_NU: NDArray[np.float64], truth_NU: NDArray[np.float64]) -> tuple[float | None, float | None]:
    known = ~np.isnan(value_NU)
    if len(value_NU) < 2 or not known.any(axis=1).all():
        return None, None
    means = [float(row[each].mean()) for row, each in zip(value_NU, known, strict=True)]
    found = kendalltau(means, truth_NU.mean(axis=1))
    tau, p_value = float(found.statistic), float(found.pvalue)
    return (None, None) if np.isnan(tau) else (tau, None if np.isnan(p_value) else p_value)
