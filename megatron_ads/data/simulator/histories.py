"""Users of a world, drawn in pieces of a fixed size, and their history up to the anchor day as prompts show it.

Memory is bounded, and more users change no earlier one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ads.data.simulator.behaviour import EVENT_TABLES, MINUTES, Behaviour, Columns, Simulation
from megatron_ads.data.simulator.population import draw_population, next_advertiser, segment_priors
from megatron_ads.data.simulator.vocabulary import AGES, GENDERS, KINDS, PLACES, PRICES, wanted_by
from megatron_ads.data.simulator.world import World
from megatron_ads.tasks.user_history import Demographics, Event, EventKind, UserHistory

PIECE = 2048
"""Users drawn at once; decides which users a seed gives, so it is not a setting."""
LABEL_DAYS = 7
"""The next conversion counts within so many days."""


def draw_pieces(world: World, *, users: int, days: int, anchor: int | None = None) -> Iterator[Behaviour]:
    """Yield the first ``users`` users of a world, ``PIECE`` at a time; the last piece may be smaller.

    Who a user is, and what happens on a day, depends on the world alone: more users or days change nothing earlier.
    """
    simulation, priors = Simulation(world), segment_priors(world.seed)
    for number, first in enumerate(range(0, users, PIECE)):
        draw = np.random.default_rng([world.seed, 2, number])
        people = draw_population(draw, priors, first_user=first, count=PIECE)
        piece = simulation.run(people, draw, days=days, anchor=anchor)
        yield piece if users - first >= PIECE else _first_users(piece, users - first)


def _first_users(piece: Behaviour, count: int) -> Behaviour:
    """Return a piece without the users from number ``count`` on."""
    shorter: dict[str, Any] = {}
    for name in EVENT_TABLES:
        table: Columns = getattr(piece, name)
        end = int(np.searchsorted(table["user"], count))
        shorter[name] = {column: values[:end] for column, values in table.items()}
    for name in ("people", "known", "true"):
        if (record := getattr(piece, name)) is not None:
            values = {field.name: getattr(record, field.name) for field in fields(record)}
            arrays = {key: value[:count] for key, value in values.items() if isinstance(value, np.ndarray)}
            shorter[name] = replace(record, **arrays)
    return replace(piece, **shorter)


Logged = list[tuple[Any, ...]]
"""Events of one user: days ago, then some columns of their table."""
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
    history: UserHistory
    next_advertiser: int | None
    """The first advertiser converted with after the anchor day; None if there was none within the simulated days."""
    next_item: str
    """What was bought there; empty without one."""
    chance_A: NDArray[np.float64]
    """How likely each advertiser is to be the next one, as far as the history can tell."""


def read_users(world: World, piece: Behaviour, *, anchor: int) -> Iterator[SimulatedUser]:
    """Yield the users of a piece, drawn with this anchor, who had a session up to the anchor day."""
    assert piece.known is not None, "the anchor is one of the days"
    people, count = piece.people, len(piece.people.age_U)
    chance_UA = next_advertiser(piece.known, world, window_days=LABEL_DAYS)

    def by_user(table: Columns, chosen: NDArray[np.bool_], *names: str) -> list[Logged]:
        """Return days ago, and the columns named, of the chosen events of every user."""
        days_ago = anchor + 1 - (table["day"] + table["minute"] / MINUTES)
        columns = [days_ago, *(table[name] for name in names)]
        events = list(zip(*(column[chosen].tolist() for column in columns), strict=True))
        starts = np.searchsorted(table["user"][chosen], np.arange(count + 1)).tolist()
        return [events[start:end] for start, end in pairwise(starts)]

    sessions, shown, bought, visits = (getattr(piece, name) for name in EVENT_TABLES)
    searches_of = by_user(sessions, sessions["day"] <= anchor, "day", "kind", "query", "onsite")
    clicks_of = by_user(shown, (shown["day"] <= anchor) & shown["clicked"], "ad")
    bought_of = by_user(bought, bought["day"] <= anchor, "kind", "advertiser", "attributed")
    visits_of = by_user(visits, visits["day"] <= anchor, "kind", "advertiser")
    later_of = by_user(bought, bought["day"] > anchor, "advertiser", "kind")
    for number in range(count):
        if not searches_of[number]:
            continue
        price, place = int(people.price_U[number]), int(people.place_U[number])
        events = _events(world, searches_of[number], clicks_of[number], bought_of[number], visits_of[number])
        who = Demographics(
            age=AGES[people.age_U[number]],
            gender=GENDERS[people.gender_U[number]],
            state=f"{SHOPPER[PRICES[price]]} in {PLACES[place]}",
        )
        yield SimulatedUser(
            place_in_piece=number,
            price=price,
            place=place,
            needs=tuple((anchor + 1 - day, kind) for _, day, kind, _, _ in reversed(searches_of[number])),
            bought_from=frozenset(advertiser for _, _, advertiser, _ in bought_of[number]),
            history=UserHistory(user_id=f"user-{people.first_user + number}", events=tuple(events), demographics=who),
            next_advertiser=later_of[number][0][1] if later_of[number] else None,
            next_item=_bought_item(world, *later_of[number][0][1:]) if later_of[number] else "",
            chance_A=chance_UA[number],
        )


def _bought_item(world: World, advertiser: int, kind: int) -> str:
    return item_of(advertiser, sold_kind(world, advertiser, kind))


def _events(world: World, searches: Logged, clicks: Logged, bought: Logged, visits: Logged) -> Iterator[Event]:
    """Yield the events of one user, from the columns that ``read_users`` reads."""
    for days_ago, _, _, query, onsite in searches:
        wanted = wanted_by(query, world.brands_of_kind)
        yield Event(
            kind=EventKind.onsite_search if onsite else EventKind.offsite_search,
            days_ago=days_ago,
            text=world.queries[query],
            category=KINDS[wanted.kind].name,
            brand="" if wanted.brand is None else world.brand_names[wanted.brand],
        )
    for days_ago, number in clicks:
        ad = world.ads[number]
        yield Event(
            kind=EventKind.click,
            days_ago=days_ago,
            text=ad.title,
            category=KINDS[ad.kind].name,
            brand=world.brand_names[ad.brand],
            advertiser=world.advertisers[ad.advertiser].name,
            item_id=item_of(ad.advertiser, ad.kind),
        )
    for days_ago, kind, advertiser, attributed in bought:
        shop = world.advertisers[advertiser]
        number = sold_kind(world, advertiser, kind)
        sold, item = KINDS[number].name, item_of(advertiser, number)
        how = EventKind.attributed_conversion if attributed else EventKind.matched_conversion
        yield Event(kind=how, days_ago=days_ago, text=sold, category=sold, advertiser=shop.name, item_id=item)
    for days_ago, kind, advertiser in visits:
        shop, sold = world.advertisers[advertiser], KINDS[kind].name
        url = f"{shop.domain}/{sold.replace(' ', '-')}"
        item = item_of(advertiser, kind)
        yield Event(
            kind=EventKind.offsite_url, days_ago=days_ago, text=url, category=sold, advertiser=shop.name, item_id=item
        )


def item_of(advertiser: int, kind: int) -> str:
    """Return the id of what an advertiser sells of a kind, as the table ``items`` of a simulation has it."""
    return f"{advertiser}-{kind}"


def sold_kind(world: World, advertiser: int, kind: int) -> int:
    """Return what somebody bought from an advertiser who looked for a kind: that, or the advertiser's main kind."""
    kinds = world.advertisers[advertiser].kinds
    return kind if kind in kinds else kinds[0]
