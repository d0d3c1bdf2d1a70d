"""What users do day by day: sessions, results shown and clicked, visits and conversions; all drawn as arrays.

A user has at most one session a day. A session on our site shows ``SLOTS`` ads for a query; one elsewhere leaves a
query and often a visit to a shop. Who a conversion is with is in ``preferences``; whether it happens, and whether it is
attributed to an ad of ours, is drawn before the ads are, so that the probability of every click and conversion has a
closed form:

    shown(d)     = ad d stands in a given slot
    P(shown)     = e / SLOTS * p(a) * offer(d) + (1 - e / SLOTS) * auction(d),    e = CONVERSION * ATTRIBUTED
    P(converted | shown) = e / SLOTS * p(a) * offer(d) / P(shown)
    P(clicked | shown)   = P(converted | shown) + (1 - P(converted | shown)) * curiosity(d)

where a is the advertiser of d, offer(d) = 1 / ADS_PER_OFFER for an ad of the needed kind that its advertiser runs and 0
for others. A conversion with an advertiser that runs no such ad is never attributed.

Letters of array shapes: U users, K kinds, M remembered conversions, N events of one table.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ads.data.simulator.population import ACTIVITY_PARAMETERS, Population
from megatron_ads.data.simulator.preferences import (
    CONVERSION,
    INTENT,
    LOYALTY,
    NOBODY,
    PERSISTENCE,
    REMEMBERED,
    REST,
    Moment,
    loyalty_weights,
)
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
from megatron_ads.data.simulator.sampling import InverseTable
from megatron_ads.data.simulator.world import ADS_PER_OFFER, SPAM, World, close_kind

SLOTS = 4
ONSITE = 0.6
"""Share of the sessions on our site."""
ATTRIBUTED = 0.6
"""Share of the conversions of a session on our site that go through one of the ads shown, where there is one."""
VISIT = 0.6
"""Share of the sessions elsewhere that leave a visit to a shop."""
_EVENT = CONVERSION * ATTRIBUTED / SLOTS
_ASPECT_SHARES = (0.35, 0.2, 0.2, 0.15, 0.1)
"""Nothing more, price, brand, detail, place."""
MINUTES = 24 * 60

EVENT_TABLES = ("sessions", "impressions", "conversions", "visits")
Columns = dict[str, NDArray[Any]]


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
        self.world = world
        self._intent = InverseTable(world.intent_KPA.reshape(-1, len(world.advertisers)))
        self._popularity = InverseTable(world.popularity_A[None, :])
        self._auction = InverseTable(world.auction_KD)
        self.ad_advertiser_D = np.array([ad.advertiser for ad in world.ads])
        self.ad_kind_D = np.array([ad.kind for ad in world.ads])
        self._ad_price_D = np.array([ad.price for ad in world.ads])
        self._ad_text_D = np.array([ad.text for ad in world.ads])
        self._close_K = np.array([close_kind(kind) for kind in range(len(world.auction_KD))])
        self._prices = world.intent_KPA.shape[1]

    def run(self, people: Population, draw: np.random.Generator, *, days: int, anchor: int | None = None) -> Behaviour:
        """Simulate ``days`` days; ``anchor`` is the day at whose end ``known`` and ``true`` are taken."""
        state = _State(people)
        tables: dict[str, list[Columns]] = defaultdict(list)
        known = true = None
        for day in range(days):
            self._simulate_day(day, people, state, tables, draw)
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

    def _simulate_day(
        self,
        day: int,
        people: Population,
        state: "_State",
        tables: dict[str, list[Columns]],
        draw: np.random.Generator,
    ) -> None:
        user = np.flatnonzero(draw.random(len(people.age_U)) < people.activity_U)
        count = len(user)
        kind = state.next_needs(user, draw)
        onsite = draw.random(count) < ONSITE
        query = self._ask(user, kind, people, draw)
        minute = draw.integers(MINUTES - 60, size=count)
        session: Columns = {"user": user, "day": np.full(count, day), "minute": minute}
        tables["sessions"].append({**session, "onsite": onsite, "query": query, "kind": kind})

        converted = draw.random(count) < CONVERSION
        shares_NM = loyalty_weights(state.recent_UM[user], day - state.recent_day_UM[user])
        advertiser = self._choose_advertiser(user, kind, shares_NM, people, state, draw)
        offered = self.world.first_ad_AK[advertiser, kind]
        wanted_ad = np.where(offered < 0, -1, offered + draw.integers(ADS_PER_OFFER, size=count))
        attributed = converted & onsite & (draw.random(count) < ATTRIBUTED) & (offered >= 0)
        wanted_ad = np.where(attributed, wanted_ad, -1)

        tables["impressions"].append(
            self._show(session, onsite, query, kind, wanted_ad, shares_NM, people, state, draw)
        )
        visiting = ~onsite & (draw.random(count) < VISIT)
        visited = self._intent.draw(kind * self._prices + people.price_U[user], draw)
        tables["visits"].append({name: column[visiting] for name, column in
                                 {**session, "kind": kind, "advertiser": visited}.items()})  # fmt: skip
        bought: Columns = {**session, "kind": kind, "advertiser": advertiser, "attributed": attributed, "ad": wanted_ad}
        bought["minute"] = minute + 20
        tables["conversions"].append({name: column[converted] for name, column in bought.items()})
        state.remember(user[converted], advertiser[converted], day)

    def _ask(
        self, user: NDArray[np.int64], kind: NDArray[np.int64], people: Population, draw: np.random.Generator
    ) -> NDArray[np.int64]:
        count = len(user)
        what = draw.choice(5, size=count, p=_ASPECT_SHARES)
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

    def _choose_advertiser(
        self,
        user: NDArray[np.int64],
        kind: NDArray[np.int64],
        shares_NM: NDArray[np.float64],
        people: Population,
        state: "_State",
        draw: np.random.Generator,
    ) -> NDArray[np.int64]:
        """Draw from p(a): first which of its three parts, then an advertiser of it."""
        count = len(user)
        part = draw.random(count)
        has = shares_NM.sum(axis=1) > 0
        cumulated_NM = np.cumsum(shares_NM, axis=1)
        # Below the sum, which rounding can leave under 1: the place found then always holds a conversion.
        place = (
            (draw.random(count)[:, None] * cumulated_NM[:, -1:] >= cumulated_NM).sum(axis=1).clip(max=REMEMBERED - 1)
        )
        loyal = state.recent_UM[user, place]
        intent = self._intent.draw(kind * self._prices + people.price_U[user], draw)
        anyone = self._popularity.draw(np.zeros(count, dtype=np.int64), draw)
        by_loyalty = has & (part >= REST) & (part < REST + LOYALTY)
        chosen: NDArray[np.int64] = np.where(part < REST, anyone, np.where(by_loyalty, loyal, intent))
        return chosen

    def _show(
        self,
        session: Columns,
        onsite: NDArray[np.bool_],
        query: NDArray[np.int64],
        kind: NDArray[np.int64],
        wanted_ad: NDArray[np.int64],
        shares_NM: NDArray[np.float64],
        people: Population,
        state: "_State",
        draw: np.random.Generator,
    ) -> Columns:
        """Fill the slots of every session on our site; one holds the ad that a conversion is attributed to."""
        place = np.repeat(np.flatnonzero(onsite), SLOTS)
        user, kind_N = session["user"][place], kind[place]
        slot = np.tile(np.arange(SLOTS), int(onsite.sum()))
        winning = np.repeat(draw.integers(SLOTS, size=int(onsite.sum())), SLOTS) == slot
        ad = self._auction.draw(kind_N, draw)
        converted = winning & (wanted_ad[place] >= 0)
        ad = np.where(converted, wanted_ad[place], ad)
        chance = self._conversion_chance(user, kind_N, ad, shares_NM[place], people, state)
        curious = self._curiosity(user, kind_N, ad, people)
        clicked = converted | (draw.random(len(ad)) < curious)
        return {
            **{name: column[place] for name, column in session.items()},
            "slot": slot,
            "query": query[place],
            "ad": ad,
            "clicked": clicked,
            "converted": converted,
            "click_chance": chance + (1 - chance) * curious,
            "conversion_chance": chance,
        }

    def _conversion_chance(
        self,
        user: NDArray[np.generic],
        kind: NDArray[np.int64],
        ad: NDArray[np.int64],
        shares_NM: NDArray[np.float64],
        people: Population,
        state: "_State",
    ) -> NDArray[np.float64]:
        advertiser = self.ad_advertiser_D[ad]
        loyal = (shares_NM * (state.recent_UM[user] == advertiser[:, None])).sum(axis=1)
        has = shares_NM.sum(axis=1) > 0
        intent = self.world.intent_KPA[kind, people.price_U[user], advertiser]
        chance = REST * self.world.popularity_A[advertiser] + np.where(
            has, LOYALTY * loyal + INTENT * intent, (LOYALTY + INTENT) * intent
        )
        offer = np.where(self.ad_kind_D[ad] == kind, 1.0 / ADS_PER_OFFER, 0.0)
        through = _EVENT * chance * offer
        # Where the chosen advertiser has no ad of the kind, the slots are all the auction's.
        without = self._without_ad(user, kind, shares_NM, people, state)
        shown = through + (1.0 - _EVENT * (1.0 - without)) * self.world.auction_KD[kind, ad]
        ratio: NDArray[np.float64] = through / shown
        return ratio

    def _without_ad(
        self,
        user: NDArray[np.generic],
        kind: NDArray[np.int64],
        shares_NM: NDArray[np.float64],
        people: Population,
        state: "_State",
    ) -> NDArray[np.float64]:
        """Return the probability that the advertiser converted with sells no such thing."""
        recent_NM = state.recent_UM[user]
        elsewhere_NM = self.world.first_ad_AK[recent_NM, kind[:, None]] < 0
        loyal = (shares_NM * elsewhere_NM).sum(axis=1)
        has = shares_NM.sum(axis=1) > 0
        sells_KA = (self.world.first_ad_AK >= 0).T
        anyone_K = (~sells_KA) @ self.world.popularity_A
        missing: NDArray[np.float64] = REST * anyone_K[kind] + np.where(has, LOYALTY * loyal, 0.0)
        return missing

    def _curiosity(
        self, user: NDArray[np.generic], kind: NDArray[np.int64], ad: NDArray[np.int64], people: Population
    ) -> NDArray[np.float64]:
        """Return the probability of a click that no conversion stands behind."""
        ad_kind = self.ad_kind_D[ad]
        related = np.where(ad_kind == kind, 1.0, np.where(self._close_K[kind] == ad_kind, 0.4, 0.1))
        price = np.where(self._ad_price_D[ad] == people.price_U[user], 1.0, 0.5)
        text = np.where(self._ad_text_D[ad] == SPAM, 0.3, 1.0)
        curious: NDArray[np.float64] = 0.15 * related * price * text
        return curious


class _State:
    """What changes from day to day."""

    def __init__(self, people: Population) -> None:
        count, kinds = people.interest_UK.shape
        self._people = people
        self._cumulated_UK = np.cumsum(people.interest_UK, axis=1)
        self.need_U = np.full(count, NOBODY)
        self.recent_UM = np.full((count, REMEMBERED), NOBODY)
        self.recent_day_UM = np.zeros((count, REMEMBERED), dtype=np.int64)
        self._drawn_UK = np.zeros((count, kinds))
        """How often each kind was drawn from the interests, as far as the history tells."""
        self._sessions_U = np.zeros(count)

    def next_needs(self, user: NDArray[np.int64], draw: np.random.Generator) -> NDArray[np.int64]:
        """Draw the needs of these users' next sessions."""
        before = self.need_U[user]
        fresh = (draw.random(len(user))[:, None] * self._cumulated_UK[user, -1:] >= self._cumulated_UK[user]).sum(
            axis=1
        )
        fresh = fresh.clip(max=self._cumulated_UK.shape[1] - 1)
        stays = (before != NOBODY) & (draw.random(len(user)) < PERSISTENCE)
        need: NDArray[np.int64] = np.where(stays, before, fresh)
        self._learn(user, before, need)
        self.need_U[user] = need
        return need

    def _learn(self, user: NDArray[np.int64], before: NDArray[np.int64], need: NDArray[np.int64]) -> None:
        """Count a changed need as drawn, an unchanged one by the probability that it was (assumed-density filter)."""
        guess = (self._people.prior_UK[user, need] + self._drawn_UK[user, need]) / (
            self._people.prior_UK[user].sum(axis=1) + self._drawn_UK[user].sum(axis=1)
        )
        share = (1 - PERSISTENCE) * guess
        self._drawn_UK[user, need] += np.where(need == before, share / (share + PERSISTENCE), 1.0)
        self._sessions_U[user] += 1

    def remember(self, user: NDArray[np.int64], advertiser: NDArray[np.int64], day: int) -> None:
        """Put a conversion in front of each of these users' others."""
        for table, newest in ((self.recent_UM, advertiser), (self.recent_day_UM, np.full(len(user), day))):
            table[user, 1:] = table[user, :-1]
            table[user, 0] = newest

    def true(self, day: int) -> Moment:
        """Return this moment with the users' true interests and activity."""
        return self._moment(day, self._people.interest_UK, self._people.activity_U)

    def known(self, day: int) -> Moment:
        """Return this moment with what the history and the model's parameters say of interests and activity."""
        counts_UK = self._people.prior_UK + self._drawn_UK
        often, seldom = ACTIVITY_PARAMETERS
        activity_U = (often + self._sessions_U) / (often + seldom + day + 1)
        return self._moment(day, counts_UK / counts_UK.sum(axis=1, keepdims=True), activity_U)

    def _moment(self, day: int, interest_UK: NDArray[np.float64], activity_U: NDArray[np.float64]) -> Moment:
        return Moment(
            day=day,
            need_U=self.need_U.copy(),
            recent_UM=self.recent_UM.copy(),
            recent_day_UM=self.recent_day_UM.copy(),
            interest_UK=interest_UK,
            activity_U=activity_U,
            price_U=self._people.price_U,
        )


def _by_user(parts: list[Columns]) -> Columns:
    """Join the days of a table and sort it by user; days stay in order."""
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(whole["user"], kind="stable")
    return {name: column[order] for name, column in whole.items()}
