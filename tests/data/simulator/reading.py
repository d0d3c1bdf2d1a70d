"""Read a query of the simulated search back into what it asks for: the judge of generated queries."""

import re

from megatron_ads.data.simulator.vocabulary import DEPARTMENTS, KINDS, PLACES, PRICES_ASKED, Wanted
from megatron_ads.data.simulator.world import World, department_of


def read_query(text: str, world: World) -> Wanted | None:
    """Return what a query asks for, or None if no kind of product is named in it.

    Of several kinds named, the one with the longest wording counts: a brewer is more than the coffee in it.
    """
    words = " ".join(re.findall(r"\w+", text.lower()))
    found = [
        (len(asked), number) for number, kind in enumerate(KINDS) for asked in kind.asked_as if _holds(words, asked)
    ]
    if not found:
        return None
    kind = max(found)[1]
    details = DEPARTMENTS[department_of(kind)].details
    return Wanted(
        kind,
        price=_group(words, PRICES_ASKED),
        brand=_index(words, world.brand_names),
        detail=_index(words, [asked for asked, _ in details]),
        place=_index(words, PLACES),
    )


def is_narrower(query: Wanted, keyword: Wanted) -> bool:
    """Return whether a query asks for all that a keyword does, and for something more."""
    kept = all(
        getattr(keyword, name) in (None, getattr(query, name)) for name in ("kind", "price", "brand", "detail", "place")
    )
    return kept and query != keyword


def _holds(words: str, phrase: str) -> bool:
    return f" {phrase.lower()} " in f" {words} "


def _index(words: str, phrases: list[str] | tuple[str, ...]) -> int | None:
    return next((number for number, phrase in enumerate(phrases) if _holds(words, phrase)), None)


def _group(words: str, groups: tuple[tuple[str, ...], ...]) -> int | None:
    return next((number for number, group in enumerate(groups) if any(_holds(words, word) for word in group)), None)
