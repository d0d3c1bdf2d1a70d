"""Built-in query-ad pairs with a known rule behind the labels; needs no file and no network.

A query asks for a category and up to two of brand, price level and place; an ad states all of these. The rule:

    Bad   if the ad's text is spam, or its category differs, or a place was asked for and the ad serves another;
    Fair  else, if the text is misspelt, or a brand or price level was asked for and differs;
    Good  else.

The reasoning states the comparisons in the order text, category, place, brand, price, and stops at the first that
makes the pair Bad. The three labels are equally frequent, so always answering the most frequent one has a balanced
accuracy of 0.5 in either binary view.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from megatron_ads.data.ads_world import (
    BRANDS,
    CATEGORIES,
    PLACES,
    PLACES_OFFERED,
    PRICES_ASKED,
    PRICES_OFFERED,
    TEXTS,
    Category,
    Price,
    Text,
)
from megatron_ads.data.rows import ChatRow
from megatron_ads.tasks.prompt_templates import Ad
from megatron_ads.tasks.relevance import Label, chat_row

T = TypeVar("T", bound=str)

DEFAULT_ROWS = 12_000
ADS_PER_QUERY = 3


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a query asks for; None is not asked for."""

    category: Category
    brand: str | None = None
    price: Price | None = None
    place: str | None = None


@dataclass(frozen=True, slots=True)
class Offered:
    """What an ad states."""

    category: Category
    brand: str
    price: Price
    place: str
    text: Text = Text.clean


@dataclass(frozen=True, slots=True)
class Pair:
    """One query and one ad: the facts and the texts."""

    query: str
    ad: Ad
    wanted: Wanted
    offered: Offered


def judge(wanted: Wanted, offered: Offered) -> tuple[Label, str]:
    """Apply the rule; return the label and the reasoning that leads to it."""
    steps = [f"Text: {offered.text}."]
    if offered.text is Text.spam:
        return Label.bad, " ".join(steps)
    for name, asked, given in _decisive(wanted, offered):
        steps.append(_compare(name, asked, given))
        if asked != given:
            return Label.bad, " ".join(steps)
    label = Label.good if offered.text is Text.clean else Label.fair
    for name, asked, given in _desirable(wanted, offered):
        steps.append(_compare(name, asked, given))
        label = label if asked == given else Label.fair
    return label, " ".join(steps)


def _decisive(wanted: Wanted, offered: Offered) -> Iterator[tuple[str, str, str]]:
    """Yield what must agree: name, asked, offered."""
    yield "Category", wanted.category.name, offered.category.name
    if wanted.place is not None:
        yield "Place", wanted.place, offered.place


def _desirable(wanted: Wanted, offered: Offered) -> Iterator[tuple[str, str, str]]:
    """Yield what should agree: name, asked, offered."""
    if wanted.brand is not None:
        yield "Brand", wanted.brand, offered.brand
    if wanted.price is not None:
        yield "Price", wanted.price, offered.price


def _compare(name: str, asked: str, given: str) -> str:
    return f"{name}: {asked} vs {given} {'agree' if asked == given else 'differ'}."


def generate_pairs(seed: int) -> Iterator[Pair]:
    """Yield pairs without end, ``ADS_PER_QUERY`` ads to each query drawn; a query's text may come up again."""
    draw = random.Random(f"query-ad pairs {seed}")
    while True:
        wanted = _draw_wanted(draw)
        query = _word_query(wanted, draw)
        for _ in range(ADS_PER_QUERY):
            offered = _draw_offered(wanted, draw.choice(tuple(Label)), draw)
            yield Pair(query=query, ad=_word_ad(offered, draw), wanted=wanted, offered=offered)


def builtin_rows(count: int = DEFAULT_ROWS, *, seed: int = 0) -> list[ChatRow]:
    """Return ``count`` rows of the built-in pairs."""
    rows = []
    for number, pair in zip(range(count), generate_pairs(seed), strict=False):
        label, reasoning = judge(pair.wanted, pair.offered)
        rows.append(chat_row(f"builtin-{number}", pair.query, pair.ad, label, reasoning))
    return rows


def _draw_wanted(draw: random.Random) -> Wanted:
    asked = draw.sample(("brand", "price", "place"), draw.randint(0, 2))
    return Wanted(
        category=draw.choice(CATEGORIES),
        brand=draw.choice(BRANDS) if "brand" in asked else None,
        price=draw.choice(tuple(Price)) if "price" in asked else None,
        place=draw.choice(PLACES) if "place" in asked else None,
    )


def _draw_offered(wanted: Wanted, label: Label, draw: random.Random) -> Offered:
    """Draw an ad for which the rule gives ``label``: what must differ first, the rest as asked or at random."""
    wrong: set[str] = set()
    if label is Label.bad:
        wrong = {draw.choice(["spam", "category", "place"] if wanted.place else ["spam", "category"])}
    elif label is Label.fair:
        possible = ["misspelt", *(name for name in ("brand", "price") if getattr(wanted, name) is not None)]
        wrong = set(draw.sample(possible, draw.randint(1, len(possible))))
    other_category = draw.choice([category for category in CATEGORIES if category != wanted.category])
    return Offered(
        category=other_category if "category" in wrong else wanted.category,
        brand=_draw_value(BRANDS, wanted.brand, "brand" in wrong, draw),
        price=_draw_value(tuple(Price), wanted.price, "price" in wrong, draw),
        place=_draw_value(PLACES, wanted.place, "place" in wrong, draw),
        text=next((text for text in (Text.spam, Text.misspelt) if text in wrong), Text.clean),
    )


def _draw_value(values: tuple[T, ...], asked: T | None, wrong: bool, draw: random.Random) -> T:
    if wrong:
        return draw.choice([value for value in values if value != asked])
    return draw.choice(values) if asked is None else asked


def _word_query(wanted: Wanted, draw: random.Random) -> str:
    words = [draw.choice(wanted.category.asked_as)]
    if wanted.brand:
        words.insert(0, wanted.brand.lower())
    if wanted.price:
        words.insert(0, draw.choice(PRICES_ASKED[wanted.price]))
    if wanted.place:
        words.append(draw.choice(("in", "near")) + " " + wanted.place.lower())
    return " ".join(words)


def _word_ad(offered: Offered, draw: random.Random) -> Ad:
    sentences = [
        draw.choice(PRICES_OFFERED[offered.price]),
        draw.choice(PLACES_OFFERED).format(place=offered.place),
        draw.choice(TEXTS[offered.text]),
    ]
    draw.shuffle(sentences)
    name = draw.choice(offered.category.offered_as)
    return Ad(title=f"{offered.brand} {name}", description=" ".join(sentences))
