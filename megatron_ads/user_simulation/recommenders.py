"""Recommenders whose pages users browse. They have the logs before the anchor, and of the simulated users the history.

    random      a permutation of each user's own
    popular     by events with an advertiser, of the users that may be learned from
    recent      advertisers bought from, newest first, then popular ones
    factors     PureSVD (Cremonesi et al., RecSys 2010): scores r V V^T, r = log(1 + events) of the user with each
                advertiser, V the first right singular vectors of the same table of the users learned from
    two_towers  the frozen pipeline's retriever on the user's history, without a query
    diluted     two_towers with every second place drawn evenly from the rest
    answers     names that a language model gave, then popular ones

Letters of array shapes: U users, A advertisers, L places.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import svds

from megatron_ads.config.user_simulation import AnswersConfig, RecommenderKind
from megatron_ads.downstream.logs import item_numbers
from megatron_ads.downstream.retriever import top_k
from megatron_ads.downstream.user_answers import read_user_answers
from megatron_ads.errors import DataError
from megatron_ads.metrics.ranking import same_name
from megatron_ads.tasks.user_history import CONVERSIONS
from megatron_ads.user_simulation.business import Business

Ranking = NDArray[np.int64]
"""(U, L): numbers of advertisers, the best first, each once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankerSettings:
    """What some recommenders need besides the business."""

    seed: int
    """Of what is drawn evenly."""
    factors: int = 16
    """Singular values that ``factors`` keeps."""
    answers: AnswersConfig = field(default_factory=AnswersConfig)
    """What ``answers`` recommends."""


def rankings(business: Business, kinds: Sequence[RecommenderKind], settings: RankerSettings) -> dict[str, Ranking]:
    """Return how each recommender orders all advertisers for each user.

    Raises:
        DataError: If answers cannot be read, or are to none of these users.
    """
    return {str(kind): _RANKERS[kind](business, settings) for kind in kinds}


def best_ranking(business: Business) -> Ranking:
    """Return the order by the true probabilities, which no recommender has: what the others are held against."""
    return _best_first(business.users.chance_UA)


def _best_first(score_UA: NDArray[np.float64]) -> Ranking:
    return top_k(score_UA.astype(np.float32), score_UA.shape[1])


def events_with(business: Business, users: Sequence[str]) -> NDArray[np.float64]:
    """Return (U, A): how many events before the anchor each user has with each advertiser."""
    numbers = item_numbers(business.past.items)
    counts_UA = np.zeros((len(users), len(numbers)))
    for row, user in enumerate(users):
        for event in business.past.events[user]:
            if (number := numbers.get(same_name(event.advertiser))) is not None:
                counts_UA[row, number] += 1
    return counts_UA


def _random(business: Business, settings: RankerSettings) -> Ranking:
    draw = np.random.default_rng([settings.seed, 1])
    count = len(business.past.items)
    return np.stack([draw.permutation(count) for _ in business.users.names])


def popularity(business: Business) -> NDArray[np.float64]:
    """Return (A,): events with each advertiser, of the users that may be learned from."""
    totals: NDArray[np.float64] = events_with(business, business.learned_from).sum(axis=0)
    return totals


def _popular(business: Business, settings: RankerSettings) -> Ranking:
    return np.repeat(_best_first(popularity(business)[None]), len(business.users), axis=0)


def _recent(business: Business, settings: RankerSettings) -> Ranking:
    numbers = item_numbers(business.past.items)
    first = []
    for name in business.users.names:
        bought = [event.advertiser for event in business.past.events[name] if event.kind in CONVERSIONS]
        found = [numbers.get(same_name(advertiser)) for advertiser in reversed(bought)]
        first.append([number for number in found if number is not None])
    return _then_popular(first, business, settings)


def _then_popular(first: Sequence[Sequence[int]], business: Business, settings: RankerSettings) -> Ranking:
    popular = _popular(business, settings)[0].tolist()
    return np.array([list(dict.fromkeys([*own, *popular])) for own in first])


def _factors(business: Business, settings: RankerSettings) -> Ranking:
    learned_UA = np.log1p(events_with(business, business.learned_from))
    most = min(learned_UA.shape) - 1  # svds finds no more
    start = np.ones(min(learned_UA.shape))  # not drawn: the same vectors every time
    _, _, vectors = svds(learned_UA, k=min(settings.factors, most), v0=start)
    own_UA = np.log1p(events_with(business, business.users.names))
    return _best_first(own_UA @ vectors.T @ vectors)


def _two_towers(business: Business, settings: RankerSettings) -> Ranking:
    pipeline = business.pipeline
    user_UC = pipeline.users(business.histories, [""] * len(business.histories))
    return pipeline.retrieve(user_UC, len(pipeline.items))


def _diluted(business: Business, settings: RankerSettings) -> Ranking:
    draw, ordered = np.random.default_rng([settings.seed, 2]), _two_towers(business, settings)
    mixed = []
    for own in ordered:
        drawn = draw.permutation(own)
        mixed.append(list(dict.fromkeys(number for pair in zip(own, drawn, strict=True) for number in pair)))
    return np.array(mixed)


def _answers(business: Business, settings: RankerSettings) -> Ranking:
    given = settings.answers
    assert given.rows is not None and given.file is not None, "checked with the recipe"
    read = read_user_answers(Path(given.rows), Path(given.file))
    numbers, anchor = item_numbers(business.past.items), round(business.anchor)
    said = {one.user: one.advertisers for one in read.answers if one.anchor == anchor}
    found = [
        [number for name in said.get(user, ()) if (number := numbers.get(same_name(name))) is not None]
        for user in business.users.names
    ]
    if not any(found):
        raise DataError(
            f"{given.file} names no known advertiser for any of the {len(found)} simulated users. Give "
            "answers to rows that `megatron-ads downstream rows` wrote for this pipeline and these logs."
        )
    return _then_popular(found, business, settings)


_RANKERS: dict[RecommenderKind, Callable[[Business, RankerSettings], Ranking]] = {
    RecommenderKind.random: _random,
    RecommenderKind.popular: _popular,
    RecommenderKind.recent: _recent,
    RecommenderKind.factors: _factors,
    RecommenderKind.two_towers: _two_towers,
    RecommenderKind.diluted: _diluted,
    RecommenderKind.answers: _answers,
}
