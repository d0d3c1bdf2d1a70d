"""What users do day by day: sessions, results shown and clicked, visits and conversions; all drawn as arrays.

A user has at most one session a day. A session on our site shows ads for a query (``results_page``); one elsewhere
leaves a query and often a visit to a shop. With whom a conversion is stands in ``preferences``.

Letters of array shapes: U users, M remembered conversions, N sessions of a day.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_ads.data.simulator.population import Population
from megatron_ads.data.simulator.preferences import CONVERSION, LOYALTY, REMEMBERED, REST, Moment, loyalty_weights
from megatron_ads.data.simulator.queries import (
    ASPECTS,
    BRANDS_PER_KIND,
    DETAILS,
    FIRST_BRAND,
    FIRST_DETAIL,
    FIRST_PLACE,
    FIRST_PRICE,
    WORDINGS,
)
from megatron_ads.data.simulator.results_page import ATTRIBUTED, ResultsPage
from megatron_ads.data.simulator.sampling import InverseTable
from megatron_ads.data.simulator.sessions import Columns, Sessions
from megatron_ads.data.simulator.user_state import UserState
from megatron_ads.data.simulator.world import ADS_PER_OFFER, World

ONSITE = 0.6
"""Share of the sessions on our site."""
VISIT = 0.6
"""Share of the sessions elsewhere that leave a visit to a shop."""
_ASPECT_SHARES = (0.35, 0.2, 0.2, 0.15, 0.1)
"""Nothing more, price, brand, detail, place."""
MINUTES = 24 * 60
_TO_CONVERSION_MINUTES = 20

EVENT_TABLES = ("sessions", "impressions", "conversions", "visits")


@dataclass(frozen=True, kw_only=True, slots=True)
class Behaviour:
    """Tables of events, each sorted by user and day; ``user`` counts from 0 in this population."""

    sessions: Columns
    """user, day, minute, onsite, query, kind"""
    impressions: Columns
    """user, day, minute, slot, query, ad, clicked, converted, click_chance, conversion_chance"""
    conversions: Columns
    """user, day, minute, kind, advertiser, attributed, ad (-1 if not attributed)"""
    visits: Columns
    """user, day, minute, kind, advertiser"""
    known: Moment | None
    """At the anchor day: what a reader of the history who knows the model's parameters can say."""
    true: Moment | None
    """At the anchor day: with the users' true interests and activity."""


class Simulation:
    """Draws the behaviour of populations in one world; holds the tables that all of them share."""

    def __init__(self, world: World) -> None:
        """Make the world's probabilities ready for drawing."""
        self._world = world
        self._prices = world.intent_KPA.shape[1]
        self._intent = InverseTable(world.intent_KPA.reshape(-1, len(world.advertisers)))
        self._popularity = InverseTable(world.popularity_A[None, :])
        self._page = ResultsPage(world)

    def run(self, people: Population, draw: np.random.Generator, *, days: int, anchor: int | None = None) -> Behaviour:
        """Simulate ``days`` days; ``anchor`` is the day at whose end ``known`` and ``true`` are taken."""
        state = UserState(people)
        tables: dict[str, list[Columns]] = defaultdict(list)
        known = true = None
        for day in range(days):
            sessions = _begin_sessions(day, people, state, draw)
            for name, columns in self._simulate_sessions(day, sessions, state, draw).items():
                tables[name].append(columns)
            if day == anchor:
                known, true = state.known(day), state.true(day)
        merged = {name: _by_user(parts) for name, parts in tables.items()}
        return Behaviour(
            sessions=merged["sessions"],
            impressions=merged["impressions"],
            conversions=merged["conversions"],
            visits=merged["visits"],
            known=known,
            true=true,
        )

    def _simulate_sessions(
        self, day: int, sessions: Sessions, state: UserState, draw: np.random.Generator
    ) -> dict[str, Columns]:
        """Return the events of a day, and remember its conversions."""
        count = len(sessions)
        converted = draw.random(count) < CONVERSION
        advertiser = self._choose_advertiser(sessions, draw)
        first_ad = self._world.first_ad_AK[advertiser, sessions.kind]
        ad = first_ad + draw.integers(ADS_PER_OFFER, size=count)
        attributed = converted & sessions.onsite & (draw.random(count) < ATTRIBUTED) & (first_ad >= 0)
        ad = np.where(attributed, ad, -1)
        impressions = self._page.show(sessions, ad, draw)
        visiting = ~sessions.onsite & (draw.random(count) < VISIT)
        visited = self._intent.draw(sessions.kind * self._prices + sessions.price, draw)
        bought = sessions.take(converted).columns("kind")
        bought |= {"advertiser": advertiser[converted], "attributed": attributed[converted], "ad": ad[converted]}
        bought["minute"] = bought["minute"] + _TO_CONVERSION_MINUTES
        state.remember(bought["user"], bought["advertiser"], day)
        return {
            "sessions": sessions.columns("onsite", "query", "kind"),
            "impressions": impressions,
            "conversions": bought,
            "visits": sessions.take(visiting).columns("kind") | {"advertiser": visited[visiting]},
        }

    def _choose_advertiser(self, sessions: Sessions, draw: np.random.Generator) -> NDArray[np.int64]:
        """Draw from p(a): first which of its three parts, then an advertiser of it."""
        count = len(sessions)
        part = draw.random(count)
        cumulated_NM = np.cumsum(sessions.shares_NM, axis=1)
        # Below the sum, which rounding can leave under 1: the place found then always holds a conversion.
        passed_NM = draw.random(count)[:, None] * cumulated_NM[:, -1:] >= cumulated_NM
        loyal = sessions.recent_NM[np.arange(count), passed_NM.sum(axis=1).clip(max=REMEMBERED - 1)]
        intent = self._intent.draw(sessions.kind * self._prices + sessions.price, draw)
        anyone = self._popularity.draw(np.zeros(count, dtype=np.int64), draw)
        by_loyalty = sessions.has_bought & (part >= REST) & (part < REST + LOYALTY)
        chosen: NDArray[np.int64] = np.where(part < REST, anyone, np.where(by_loyalty, loyal, intent))
        return chosen


def _begin_sessions(day: int, people: Population, state: UserState, draw: np.random.Generator) -> Sessions:
    """Draw who is there on a day, what they need, and how they ask for it."""
    user = np.flatnonzero(draw.random(len(people.age_U)) < people.activity_U)
    kind = state.next_needs(user, draw)
    onsite = draw.random(len(user)) < ONSITE
    query = _ask(user, kind, people, draw)
    return Sessions(
        user=user,
        day=np.full(len(user), day),
        minute=draw.integers(MINUTES - 3 * _TO_CONVERSION_MINUTES, size=len(user)),
        kind=kind,
        query=query,
        onsite=onsite,
        price=people.price_U[user],
        recent_NM=state.recent_UM[user],
        shares_NM=loyalty_weights(state.recent_UM[user], day - state.recent_day_UM[user]),
    )


def _ask(
    user: NDArray[np.int64], kind: NDArray[np.int64], people: Population, draw: np.random.Generator
) -> NDArray[np.int64]:
    count = len(user)
    what = draw.choice(len(_ASPECT_SHARES), size=count, p=_ASPECT_SHARES)
    aspect = np.select(
        [what == 1, what == 2, what == 3, what == 4],
        [
            FIRST_PRICE + people.price_U[user],
            FIRST_BRAND + draw.integers(BRANDS_PER_KIND, size=count),
            FIRST_DETAIL + draw.integers(DETAILS, size=count),
            FIRST_PLACE + people.place_U[user],
        ],
        0,
    )
    query: NDArray[np.int64] = (kind * ASPECTS + aspect) * WORDINGS + draw.integers(WORDINGS, size=count)
    return query


def _by_user(parts: list[Columns]) -> Columns:
    """Join the days of a table and sort it by user; days stay in order."""
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(whole["user"], kind="stable")
    return {name: column[order] for name, column in whole.items()}
