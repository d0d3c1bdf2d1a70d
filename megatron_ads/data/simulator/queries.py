"""Every query of the simulated search: what it asks for, and its text.

A query asks for a kind of product and at most one thing more. Its number says all of it,

    query = (kind * ASPECTS + aspect) * WORDINGS + wording,

so that logs of millions of searches are drawn as numbers.

Aspects: 0 nothing more, then the price levels, the brands of the kind, the details of the department, the places.
"""

from dataclasses import dataclass

import numpy as np

from megatron_ads.data.simulator.vocabulary import (
    DEPARTMENTS,
    KINDS,
    KINDS_PER_DEPARTMENT,
    NEARBY_ASKED,
    PLACES,
    PRICES,
    PRICES_ASKED,
)

BRANDS_PER_KIND = 3
WORDINGS = 4
DETAILS = len(DEPARTMENTS[0].details)

FIRST_PRICE = 1
FIRST_BRAND = FIRST_PRICE + len(PRICES)
FIRST_DETAIL = FIRST_BRAND + BRANDS_PER_KIND
FIRST_PLACE = FIRST_DETAIL + DETAILS
ASPECTS = FIRST_PLACE + len(PLACES)
QUERY_COUNT = len(KINDS) * ASPECTS * WORDINGS


@dataclass(frozen=True, slots=True)
class Wanted:
    """What somebody looks for; None is not asked for. Brands, details and places by their number in the world."""

    kind: int
    price: int | None = None
    brand: int | None = None
    detail: int | None = None
    """Number among the details of the kind's department."""
    place: int | None = None


def wanted_by(query: int, brands_of_kind: np.ndarray) -> Wanted:
    """Return what a query asks for; ``brands_of_kind`` is (kinds, BRANDS_PER_KIND)."""
    kind, rest = divmod(query, ASPECTS * WORDINGS)
    aspect = rest // WORDINGS
    if aspect >= FIRST_PLACE:
        return Wanted(kind, place=aspect - FIRST_PLACE)
    if aspect >= FIRST_DETAIL:
        return Wanted(kind, detail=aspect - FIRST_DETAIL)
    if aspect >= FIRST_BRAND:
        return Wanted(kind, brand=int(brands_of_kind[kind, aspect - FIRST_BRAND]))
    if aspect >= FIRST_PRICE:
        return Wanted(kind, price=aspect - FIRST_PRICE)
    return Wanted(kind)


def word_query(wanted: Wanted, brand_names: list[str], wording: int) -> str:
    """Return one of the ``WORDINGS`` texts of a wish."""
    words = KINDS[wanted.kind].asked_as[wording]
    if wanted.brand is not None:
        words = f"{brand_names[wanted.brand].lower()} {words}"
    if wanted.price is not None:
        words = f"{PRICES_ASKED[wanted.price][wording]} {words}"
    if wanted.detail is not None:
        words = f"{words} {DEPARTMENTS[wanted.kind // KINDS_PER_DEPARTMENT].details[wanted.detail][0]}"
    if wanted.place is not None:
        words = NEARBY_ASKED[wording].format(what=words, place=PLACES[wanted.place].lower())
    return words


def word_all_queries(brands_of_kind: np.ndarray, brand_names: list[str]) -> list[str]:
    """Return the text of every query, by number."""
    return [word_query(wanted_by(query, brands_of_kind), brand_names, query % WORDINGS) for query in range(QUERY_COUNT)]
