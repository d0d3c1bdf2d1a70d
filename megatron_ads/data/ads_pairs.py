"""Built-in query-ad pairs whose labels follow a known rule; they need no file and no network.

A query asks for a category and up to two of brand, price level and place; an ad states all of these. The rule:

    Bad   if the ad's text is spam, or its category differs, or a place was asked for and the ad serves another;
    Fair  else, if the text is misspelt, or a brand or price level was asked for and differs;
    Good  else.

The reasoning states the comparisons in the order text, category, place, brand, price, and stops at the first that
makes the pair Bad. The three labels are equally frequent, so always answering the most frequent one has a balanced
accuracy of 0.5 in either binary view. Queries and ads word the same thing differently, so that matching strings does
not solve the task.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from typing import TypeVar

from megatron_ads.data.simulator.vocabulary import PLACES_OFFERED, Kind
from megatron_ads.rows import ChatRow
from megatron_ads.tasks.prompts import Ad
from megatron_ads.tasks.relevance import Label, chat_row

T = TypeVar("T", bound=str)

DEFAULT_ROWS = 12_000
ADS_PER_QUERY = 3


class Price(StrEnum):
    """What a searcher wants to spend, and what an ad charges."""

    cheap = "cheap"
    premium = "premium"


class Text(StrEnum):
    """Quality of an ad's text."""

    clean = "clean"
    misspelt = "misspelt"
    spam = "spam"


CATEGORIES = (
    Kind("shoes", ("running shoes", "jogging sneakers", "shoes for a marathon"), ("Road Runner", "Race Trainers")),
    Kind("laptops", ("laptop", "notebook computer", "portable pc"), ("Ultrabook 14", "Slim Laptop")),
    Kind("hotels", ("hotel", "place to stay", "room for two nights"), ("City Hotel", "Boutique Suites")),
    Kind("coffee", ("coffee maker", "espresso machine", "drip brewer"), ("Barista One", "Morning Brewer")),
    Kind("sofas", ("sofa", "couch", "living room seating"), ("Corner Sofa", "Sleeper Couch")),
    Kind("headphones", ("headphones", "earbuds", "wireless headset"), ("Studio Earphones", "Quiet Headset")),
    Kind("insurance", ("car insurance", "auto policy", "motor cover"), ("Drive Cover", "Auto Insurance")),
    Kind("mats", ("yoga mat", "pilates mat", "exercise mat"), ("Balance Mat", "Studio Mat")),
    Kind("kibble", ("dog food", "puppy kibble", "food for my dog"), ("Happy Paws Kibble", "Canine Dinner")),
    Kind("phones", ("smartphone", "mobile phone", "android handset"), ("Pocket Phone", "Photo Smartphone")),
    Kind("tents", ("camping tent", "tent for four", "hiking shelter"), ("Trail Tent", "Dome Shelter")),
    Kind("pizza", ("pizza delivery", "order a pizza", "pizza tonight"), ("Stone Oven Pizza", "Pizza Box")),
    Kind("dentists", ("dentist", "teeth cleaning", "dental clinic"), ("Bright Smile Clinic", "Family Dental")),
    Kind("watches", ("wrist watch", "chronograph", "watch for a gift"), ("Classic Timepiece", "Steel Chrono")),
    Kind("tools", ("garden tools", "hedge trimmer", "spade and rake"), ("Green Thumb Kit", "Hedge Cutter")),
    Kind("strollers", ("baby stroller", "pushchair", "buggy for twins"), ("City Pram", "Travel Buggy")),
)
BRANDS = ("Norvik", "Altea", "Bramble", "Corvid", "Dunmore", "Elsinor", "Fjord", "Gantry")
PLACES = ("Boston", "Austin", "Denver", "Seattle", "Chicago", "Miami", "Dublin", "Leeds")
PRICES_ASKED = {Price.cheap: ("cheap", "affordable", "budget"), Price.premium: ("luxury", "premium", "high end")}
PRICES_OFFERED = {
    Price.cheap: ("Low prices all week.", "Everything under $25.", "Half price this month."),
    Price.premium: ("Handmade, from $900.", "First class in every detail.", "Exclusive designer range."),
}
TEXTS = {
    Text.clean: ("Free returns.", "Rated 4.7 of 5.", "Order online today.", "Friendly support."),
    Text.misspelt: ("Freindly suport.", "Ordr onlin today.", "Beleive the revews."),
    Text.spam: ("CLICK HERE NOW!!!", "100% miracle, guaranteed!!!", "You have WON a prize!!!"),
}


@dataclass(frozen=True, slots=True)
class QueryIntent:
    """What a query asks for; None is not asked for."""

    category: Kind
    brand: str | None = None
    price: Price | None = None
    place: str | None = None


@dataclass(frozen=True, slots=True)
class Offered:
    """What an ad states."""

    category: Kind
    brand: str
    price: Price
    place: str
    text: Text = Text.clean


@dataclass(frozen=True, slots=True)
class QueryAdPair:
    """One query and one ad: the facts and the texts."""

    query: str
    ad: Ad
    wanted: QueryIntent
    offered: Offered


def judge(wanted: QueryIntent, offered: Offered) -> tuple[Label, str]:
    """Apply the rule; return the label and the reasoning that leads to it."""
    steps = [f"Text: {offered.text}."]
    label = {Text.clean: Label.good, Text.misspelt: Label.fair, Text.spam: Label.bad}[offered.text]
    for name, asked, given, if_different in (
        ("Category", wanted.category.name, offered.category.name, Label.bad),
        ("Place", wanted.place, offered.place, Label.bad),
        ("Brand", wanted.brand, offered.brand, Label.fair),
        ("Price", wanted.price, offered.price, Label.fair),
    ):
        if label is Label.bad:
            break
        if asked is not None:
            steps.append(f"{name}: {asked} vs {given} {'agree' if asked == given else 'differ'}.")
            label = label if asked == given else if_different
    return label, " ".join(steps)


def generate_pairs(seed: int) -> Iterator[QueryAdPair]:
    """Yield pairs endlessly, ``ADS_PER_QUERY`` ads for each query drawn; a query's text may recur."""
    draw = random.Random(f"query-ad pairs {seed}")
    while True:
        wanted = _draw_wanted(draw)
        query = _word_query(wanted, draw)
        for _ in range(ADS_PER_QUERY):
            offered = _draw_offered(wanted, draw.choice(tuple(Label)), draw)
            yield QueryAdPair(query=query, ad=_word_ad(offered, draw), wanted=wanted, offered=offered)


def builtin_rows(count: int = DEFAULT_ROWS, *, seed: int = 0) -> list[ChatRow]:
    """Return ``count`` rows of the built-in pairs."""
    rows = []
    for number, pair in enumerate(islice(generate_pairs(seed), count)):
        label, reasoning = judge(pair.wanted, pair.offered)
        rows.append(chat_row(f"builtin-{number}", pair.query, pair.ad, label, reasoning))
    return rows


def _draw_wanted(draw: random.Random) -> QueryIntent:
    asked = draw.sample(("brand", "price", "place"), draw.randint(0, 2))
    return QueryIntent(
        category=draw.choice(CATEGORIES),
        brand=draw.choice(BRANDS) if "brand" in asked else None,
        price=draw.choice(tuple(Price)) if "price" in asked else None,
        place=draw.choice(PLACES) if "place" in asked else None,
    )


def _draw_offered(wanted: QueryIntent, label: Label, draw: random.Random) -> Offered:
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


def _word_query(wanted: QueryIntent, draw: random.Random) -> str:
    words = [draw.choice(wanted.category.asked_as)]
    if wanted.brand:
        words.insert(0, wanted.brand.lower())
    if wanted.price:
        words.insert(0, draw.choice(PRICES_ASKED[wanted.price]))
    if wanted.place:
        words += [draw.choice(("in", "near")), wanted.place.lower()]
    return " ".join(words)


def _word_ad(offered: Offered, draw: random.Random) -> Ad:
    price, place = draw.choice(PRICES_OFFERED[offered.price]), draw.choice(PLACES_OFFERED).format(place=offered.place)
    sentences = [price, place, draw.choice(TEXTS[offered.text])]
    draw.shuffle(sentences)
    return Ad(f"{offered.brand} {draw.choice(offered.category.offered_as)}", " ".join(sentences))
