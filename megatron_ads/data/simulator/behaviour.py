"""What users do day by day: sessions, ads shown and clicked, visits and conversions; all drawn as arrays.

A user has at most one session a day. A session on our site shows ads for a query; one elsewhere leaves a query and
often a visit to a shop. Which advertiser a conversion is with follows from p(a) in ``population``.

Whether a session converts through an ad of ours is drawn before the ads are. That gives a closed form for the
probability of every click and conversion:

    shown(d)     = ad d is in a given slot
    P(shown)     = e / SLOTS * p(a) * offer(d) + (1 - e / SLOTS * q) * auction(d),    e = CONVERSION * ATTRIBUTED
    P(converted | shown) = e / SLOTS * p(a) * offer(d) / P(shown)
    P(clicked | shown)   = P(converted | shown) + (1 - P(converted | shown)) * curiosity(d)

    stays, seconds = log-normal around STAY_CONVERTED, or around STAY * curiosity(d) / CURIOSITY after a mere click

where a is the advertiser of d; offer(d) = 1 / ADS_PER_OFFER for an ad of the needed kind and 0 for others; q is the
probability that the advertiser converted with runs ads of the kind: a conversion with one that does not is never
attributed.

Letters of array shapes: U users, D ads, K kinds, A advertisers, M remembered conversions, N sessions or impressions.
"""

from collections import defaultdict
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ads.data.simulator import vocabulary
from megatron_ads.data.simulator.population import (
    CONVERSION,
    INTENT,
    LOYALTY,
    REMEMBERED,
    REST,
    Moment,
    Population,
    UserState,
    loyalty_weights,
)
from megatron_ads.data.simulator.world import ADS_PER_OFFER, SPAM, World, close_kind


class InverseTable:
    """Rows of probabilities, made ready for drawing.

    The cumulative rows are concatenated, row r shifted by r, so that they increase throughout and one binary search
    finds a place in any of them.
    """

    def __init__(self, chances: NDArray[np.float64]) -> None:
        """Take (rows, outcomes) of probabilities; every row sums to 1."""
        cumulated = np.cumsum(chances, axis=1)
        cumulated /= cumulated[:, -1:]
        self._flat = (cumulated + np.arange(len(chances))[:, None]).ravel()
        self._outcomes = chances.shape[1]

    def draw(self, row: NDArray[np.int64], draw: np.random.Generator) -> NDArray[np.int64]:
        """Return one outcome of the distribution of each ``row``."""
        place = np.searchsorted(self._flat, row + draw.random(len(row)), side="right")
        outcome: NDArray[np.int64] = (place - row * self._outcomes).clip(max=self._outcomes - 1)
        return outcome


Columns = dict[str, NDArray[Any]]
"""A table of events, by column."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sessions:
    """N sessions; M remembered conversions of each user before it."""

    user: NDArray[np.int64]
    day: NDArray[np.int64]
    minute: NDArray[np.int64]
    kind: NDArray[np.int64]
    """What is needed."""
    query: NDArray[np.int64]
    onsite: NDArray[np.bool_]
    price: NDArray[np.int64]
    recent_NM: NDArray[np.int64]
    """Advertisers of the user's latest conversions."""
    shares_NM: NDArray[np.float64]
    """Share of each of them in the user's loyalty."""

    def __len__(self) -> int:
        return len(self.user)

    @property
    def has_bought(self) -> NDArray[np.bool_]:
        """Whether the user converted before."""
        bought: NDArray[np.bool_] = self.shares_NM.sum(axis=1) > 0
        return bought

    def take(self, chosen: NDArray[Any]) -> "Sessions":
        """Return the sessions at some places, or where a mask is true."""
        return Sessions(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})

    def columns(self, *names: str) -> Columns:
        """Return who and when, and what else is named."""
        return {name: getattr(self, name) for name in ("user", "day", "minute", *names)}


SLOTS = 4
ATTRIBUTED = 0.6
"""Share of the conversions of a session on our site that go through one of the ads shown, where there is one."""
_EVENT = CONVERSION * ATTRIBUTED / SLOTS
CURIOSITY = 0.15
_CURIOSITY_CLOSE, _CURIOSITY_OTHER = 0.4, 0.1
"""Factors for ads of the kind that can stand in for the needed one, and of any other."""
_CURIOSITY_PRICE, _CURIOSITY_SPAM = 0.5, 0.3
"""Factors for ads of the other price level, and for spam."""
_STAY, _STAY_CONVERTED, _STAY_SPREAD = 60.0, 180.0, 0.8
"""Median seconds on the page behind a click, without and with a conversion, and the standard deviation of their log."""


class ResultsPage:
    """Shows the ads of one world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._auction = InverseTable(world.auction_KD)
        facts = np.array([(ad.advertiser, ad.kind, ad.price, ad.text) for ad in world.ads])
        self._advertiser_D, self._kind_D, self._price_D, self._text_D = facts.T
        self._anyone_without_K = (world.first_ad_AK < 0).T @ world.popularity_A

    def show(self, sessions: Sessions, wanted_ad: NDArray[np.int64], draw: np.random.Generator) -> Columns:
        """Fill the slots of every session on our site; one holds ``wanted_ad``, which converts, where it is not -1."""
        onsite = np.flatnonzero(sessions.onsite)
        place, slot = np.repeat(onsite, SLOTS), np.tile(np.arange(SLOTS), len(onsite))
        winning = np.repeat(draw.integers(SLOTS, size=len(onsite)), SLOTS) == slot
        shown = sessions.take(place)
        auctioned = self._auction.draw(shown.kind, draw)
        converted = winning & (wanted_ad[place] >= 0)
        ad = np.where(converted, wanted_ad[place], auctioned)
        chance, curious = self._conversion_chance(shown, ad), self._curiosity(shown, ad)
        clicked = converted | (draw.random(len(ad)) < curious)
        return {
            **shown.columns("query"),
            "slot": slot,
            "ad": ad,
            "clicked": clicked,
            "converted": converted,
            "seconds": np.where(clicked, _stay(converted, curious, draw.spawn(1)[0]), 0),
            "click_chance": chance + (1 - chance) * curious,
            "conversion_chance": chance,
        }

    def _conversion_chance(self, shown: Sessions, ad: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return P(converted | shown), as at the top of this file."""
        world, advertiser = self._world, self._advertiser_D[ad]
        loyal = (shown.shares_NM * (shown.recent_NM == advertiser[:, None])).sum(axis=1)
        intent = world.intent_KPA[shown.kind, shown.price, advertiser]
        chance = REST * world.popularity_A[advertiser] + np.where(
            shown.has_bought, LOYALTY * loyal + INTENT * intent, (LOYALTY + INTENT) * intent
        )
        elsewhere_NM = world.first_ad_AK[shown.recent_NM, shown.kind[:, None]] < 0
        without_ad = REST * self._anyone_without_K[shown.kind] + LOYALTY * (shown.shares_NM * elsewhere_NM).sum(axis=1)
        through = _EVENT * chance * np.where(self._kind_D[ad] == shown.kind, 1.0 / ADS_PER_OFFER, 0.0)
        by_auction = (1.0 - _EVENT * (1.0 - without_ad)) * world.auction_KD[shown.kind, ad]
        ratio: NDArray[np.float64] = through / (through + by_auction)
        return ratio

    def _curiosity(self, shown: Sessions, ad: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the probability of a click that leads to no conversion."""
        return curiosity(shown.kind, shown.price, self._kind_D[ad], self._price_D[ad], self._text_D[ad])


def curiosity(
    needed: NDArray[np.int64],
    level: NDArray[np.int64],
    kind: NDArray[np.int64],
    price: NDArray[np.int64],
    text: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Return the probability of a click on an ad for its own sake, at most ``CURIOSITY``; all arrays are alike.

    Args:
        needed: Kind that the user needs.
        level: The user's price level.
        kind: What the ad offers.
        price: Its price level.
        text: ``CLEAN``, ``MISSPELT`` or ``SPAM``.
    """
    close = np.where(close_kind(needed) == kind, _CURIOSITY_CLOSE, _CURIOSITY_OTHER)
    related = np.where(kind == needed, 1.0, close)
    same_level = np.where(price == level, 1.0, _CURIOSITY_PRICE)
    curious: NDArray[np.float64] = CURIOSITY * related * same_level * np.where(text == SPAM, _CURIOSITY_SPAM, 1.0)
    return curious


def _stay(converted: NDArray[np.bool_], curious: NDArray[np.float64], draw: np.random.Generator) -> NDArray[np.int64]:
    """Return how many seconds each visitor would stay, at least 1; ``draw`` is of its own, so that all else is kept."""
    median = np.where(converted, _STAY_CONVERTED, _STAY * curious / CURIOSITY)
    seconds: NDArray[np.float64] = median * draw.lognormal(sigma=_STAY_SPREAD, size=len(median))
    return np.maximum(seconds.round(), 1).astype(np.int64)


ONSITE = 0.6
VISIT = 0.6
"""Share of the sessions elsewhere that leave a visit to a shop."""
_ASPECT_SHARES = (0.35, 0.2, 0.2, 0.15, 0.1)
"""Nothing more, price, brand, detail, place."""
MINUTES = 24 * 60
_TO_CONVERSION_MINUTES = 20

EVENT_TABLES = ("sessions", "impressions", "conversions", "visits")


@dataclass(frozen=True, kw_only=True, slots=True)
class Behaviour:
    """Some users and tables of their events, each sorted by user and day; ``user`` counts from 0 among these users."""

    people: Population
    sessions: Columns
    """user, day, minute, onsite, query, kind"""
    impressions: Columns
    """user, day, minute, slot, query, ad, clicked, converted, seconds, click_chance, conversion_chance"""
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
        self._world = world
        self._prices = world.intent_KPA.shape[1]
        self._intent = InverseTable(world.intent_KPA.reshape(-1, len(world.advertisers)))
        self._popularity = InverseTable(world.popularity_A[None, :])
        self._page = ResultsPage(world)

    def run(self, people: Population, draw: np.random.Generator, *, days: int, anchor: int | None = None) -> Behaviour:
        """Simulate ``days`` days; ``anchor`` is the day at whose end ``known`` and ``true`` are taken."""
        state = UserState(people)
        tables: dict[str, list[Columns]] = defaultdict(list)
        known: Moment | None = None
        true: Moment | None = None
        for day in range(days):
            sessions = _begin_sessions(day, people, state, draw)
            for name, columns in self._simulate_sessions(day, sessions, state, draw).items():
                tables[name].append(columns)
            if day == anchor:
                known, true = state.moments(day)
        merged = {name: _by_user(parts) for name, parts in tables.items()}
        return Behaviour(people=people, known=known, true=true, **merged)

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
    count, kind = len(user), state.next_needs(user, draw)
    onsite = draw.random(count) < ONSITE
    what = draw.choice(len(_ASPECT_SHARES), size=count, p=_ASPECT_SHARES)
    aspects = (
        np.zeros_like(kind),
        vocabulary.FIRST_PRICE + people.price_U[user],
        vocabulary.FIRST_BRAND + draw.integers(vocabulary.BRANDS_PER_KIND, size=count),
        vocabulary.FIRST_DETAIL + draw.integers(vocabulary.DETAILS, size=count),
        vocabulary.FIRST_PLACE + people.place_U[user],
    )
    aspect = np.stack(aspects)[what, np.arange(count)]
    return Sessions(
        user=user,
        day=np.full(count, day),
        query=(kind * vocabulary.ASPECTS + aspect) * vocabulary.WORDINGS
        + draw.integers(vocabulary.WORDINGS, size=count),
        minute=draw.integers(MINUTES - 3 * _TO_CONVERSION_MINUTES, size=count),
        kind=kind,
        onsite=onsite,
        price=people.price_U[user],
        recent_NM=state.recent_UM[user],
        shares_NM=loyalty_weights(state.recent_UM[user], day - state.recent_day_UM[user]),
    )


def _by_user(parts: list[Columns]) -> Columns:
    """Join the days of a table and sort it by user; days stay in order."""
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(whole["user"], kind="stable")
    return {name: column[order] for name, column in whole.items()}
