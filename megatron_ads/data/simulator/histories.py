"""Users of a world, drawn in pieces of a fixed size, and their history up to the anchor day as prompts show it.

Memory is bounded, and more users change no earlier one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_ads.data.simulator.behaviour import EVENT_TABLES, MINUTES, Behaviour, Columns, Simulation
from megatron_ads.data.simulator.population import Moment, Population, draw_population, segment_priors
from megatron_ads.data.simulator.vocabulary import AGES, GENDERS, KINDS, PLACES, PRICES, wanted_by
from megatron_ads.data.simulator.world import World
from megatron_ads.tasks.user_history import Demographics, Event, EventKind, UserHistory

PIECE = 2048
"""Users drawn at once; decides which users a seed gives, so it is not a setting."""
_R = TypeVar("_R", Population, Moment | None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Some users and what they did."""

    people: Population
    behaviour: Behaviour


def draw_pieces(world: World, *, users: int, days: int, anchor: int | None = None) -> Iterator[Piece]:
    """Yield the first ``users`` users of a world, ``PIECE`` at a time; the last piece may be smaller.

    Who a user is, and what happens on a day, depends on the world alone: more users or days change nothing earlier.
    """
    simulation, priors = Simulation(world), segment_priors(world.seed)
    for number, first in enumerate(range(0, users, PIECE)):
        draw = np.random.default_rng([world.seed, 2, number])
        people = draw_population(draw, priors, first_user=first, count=PIECE)
        piece = Piece(people=people, behaviour=simulation.run(people, draw, days=days, anchor=anchor))
        yield piece if users - first >= PIECE else _first_users(piece, users - first)


def _first_users(piece: Piece, count: int) -> Piece:
    """Return a piece without the users from number ``count`` on."""
    behaviour = piece.behaviour
    tables: dict[str, Any] = {name: _rows_of(getattr(behaviour, name), count) for name in EVENT_TABLES}
    moments: dict[str, Any] = {name: _cut(getattr(behaviour, name), count) for name in ("known", "true")}
    return Piece(people=_cut(piece.people, count), behaviour=replace(behaviour, **tables, **moments))


def _rows_of(table: Columns, count: int) -> Columns:
    end = int(np.searchsorted(table["user"], count))
    return {name: column[:end] for name, column in table.items()}


def _cut(record: _R, count: int) -> _R:
    """Return a record whose arrays, all of one row a user, are cut."""
    if record is None:
        return record
    values: dict[str, Any] = {field.name: getattr(record, field.name) for field in fields(record)}
    shorter: dict[str, Any] = {key: value[:count] for key, value in values.items() if isinstance(value, np.ndarray)}
    return replace(record, **shorter)


SHOPPER = dict(zip(PRICES, ("saver", "spender"), strict=True))
"""What a profile calls somebody who buys at each price level."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedUser:
    """One user at the end of the anchor day."""

    place_in_piece: int
    """Row of this user in the arrays of the piece."""
    price: int
    place: int
    needs: tuple[tuple[int, int], ...]
    """(days ago, kind) of every session, the newest first."""
    bought_from: frozenset[int]
    """Advertisers converted with."""
    history: UserHistory
    next_advertiser: int | None
    """The first advertiser converted with after the anchor day; None if there was none within the simulated days."""


def user_name(number: int) -> str:
    """Return the id of a user in rows."""
    return f"user-{number}"


class HistoryReader:
    """Reads one user after the other out of a piece."""

    def __init__(self, world: World, people: Population, behaviour: Behaviour, *, anchor: int) -> None:
        self._world, self._people, self._anchor = world, people, anchor
        self._tables = {name: _Table(getattr(behaviour, name), len(people.age_U)) for name in EVENT_TABLES}

    def users(self) -> Iterator[SimulatedUser]:
        """Yield the users of the piece who had a session up to the anchor day."""
        for number in range(len(self._people.age_U)):
            user = self._read(number)
            if user.needs:
                yield user

    def _read(self, number: int) -> SimulatedUser:
        people = self._people
        before = {name: table.rows(number, to_day=self._anchor) for name, table in self._tables.items()}
        after = self._tables["conversions"].rows(number, from_day=self._anchor + 1)
        sessions = before["sessions"]
        needs = [
            (self._anchor + 1 - int(day), int(kind))
            for day, kind in zip(sessions["day"], sessions["kind"], strict=True)
        ]
        return SimulatedUser(
            place_in_piece=number,
            price=int(people.price_U[number]),
            place=int(people.place_U[number]),
            needs=tuple(reversed(needs)),
            bought_from=frozenset(before["conversions"]["advertiser"].tolist()),
            history=self._history(number, before),
            next_advertiser=int(after["advertiser"][0]) if len(after["advertiser"]) else None,
        )

    def _history(self, number: int, before: dict[str, Columns]) -> UserHistory:
        people = self._people
        events = [
            *self._searches(before["sessions"]),
            *self._clicks(before["impressions"]),
            *self._conversions(before["conversions"]),
            *self._visits(before["visits"]),
        ]
        who = Demographics(
            age=AGES[people.age_U[number]],
            gender=GENDERS[people.gender_U[number]],
            state=f"{SHOPPER[PRICES[people.price_U[number]]]} in {PLACES[people.place_U[number]]}",
        )
        return UserHistory(user_id=user_name(people.first_user + number), events=tuple(events), demographics=who)

    def _days_ago(self, columns: Columns) -> list[float]:
        ages: list[float] = (self._anchor + 1 - (columns["day"] + columns["minute"] / MINUTES)).tolist()
        return ages

    def _searches(self, sessions: Columns) -> Iterator[Event]:
        for days_ago, query, onsite in zip(
            self._days_ago(sessions), sessions["query"].tolist(), sessions["onsite"].tolist(), strict=True
        ):
            wanted = wanted_by(query, self._world.brands_of_kind)
            yield Event(
                kind=EventKind.onsite_search if onsite else EventKind.offsite_search,
                days_ago=days_ago,
                text=self._world.queries[query],
                category=KINDS[wanted.kind].name,
                brand="" if wanted.brand is None else self._world.brand_names[wanted.brand],
            )

    def _clicks(self, impressions: Columns) -> Iterator[Event]:
        clicked = impressions["clicked"]
        for days_ago, number, was in zip(
            self._days_ago(impressions), impressions["ad"].tolist(), clicked.tolist(), strict=True
        ):
            if was:
                ad = self._world.ads[number]
                yield Event(
                    kind=EventKind.click,
                    days_ago=days_ago,
                    text=ad.title,
                    category=KINDS[ad.kind].name,
                    brand=self._world.brand_names[ad.brand],
                    advertiser=self._world.advertisers[ad.advertiser].name,
                )

    def _conversions(self, conversions: Columns) -> Iterator[Event]:
        for days_ago, kind, advertiser, attributed in zip(
            self._days_ago(conversions),
            conversions["kind"].tolist(),
            conversions["advertiser"].tolist(),
            conversions["attributed"].tolist(),
            strict=True,
        ):
            shop = self._world.advertisers[advertiser]
            sold = kind if kind in shop.kinds else shop.kinds[0]
            yield Event(
                kind=EventKind.attributed_conversion if attributed else EventKind.matched_conversion,
                days_ago=days_ago,
                text=KINDS[sold].name,
                category=KINDS[sold].name,
                advertiser=shop.name,
            )

    def _visits(self, visits: Columns) -> Iterator[Event]:
        for days_ago, kind, advertiser in zip(
            self._days_ago(visits), visits["kind"].tolist(), visits["advertiser"].tolist(), strict=True
        ):
            shop, sold = self._world.advertisers[advertiser], KINDS[kind].name
            yield Event(
                kind=EventKind.offsite_url,
                days_ago=days_ago,
                text=f"{shop.domain}/{sold.replace(' ', '-')}",
                category=sold,
                advertiser=shop.name,
            )


class _Table:
    """One table of events, with the place where each user's events begin."""

    def __init__(self, columns: Columns, users: int) -> None:
        self._columns = columns
        self._starts: NDArray[np.int64] = np.searchsorted(columns["user"], np.arange(users + 1))

    def rows(self, user: int, *, from_day: int = 0, to_day: int | None = None) -> Columns:
        """Return the events of a user from one day to another, both included."""
        first, last = self._starts[user], self._starts[user + 1]
        days = self._columns["day"][first:last]
        begin = first + np.searchsorted(days, from_day)
        end = last if to_day is None else first + np.searchsorted(days, to_day, side="right")
        return {name: column[begin:end] for name, column in self._columns.items()}
