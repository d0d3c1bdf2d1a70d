"""Query-ad pairs with the label of a simulated rater; the three labels are about equally frequent."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from megatron_ads.data.simulator.examples import Example
from megatron_ads.data.simulator.judging import SLIP, judge_pair, slip
from megatron_ads.data.simulator.queries import BRANDS_PER_KIND, DETAILS, WORDINGS, Wanted, word_query
from megatron_ads.data.simulator.vocabulary import KINDS, PLACES, PRICES
from megatron_ads.data.simulator.world import CLEAN, MISSPELT, SPAM, AdFacts, World, close_kind, department_of, draw_ad
from megatron_ads.tasks.relevance import Ad, Label, chat_row

ADS_PER_QUERY = 3
LABELS = tuple(Label)


def pair_examples(world: World, *, three_labels: bool) -> Iterator[Example]:
    """Yield examples without end, ``ADS_PER_QUERY`` to each query drawn; a query's text may come up again.

    With ``three_labels`` a row asks for the place and the ad's writing, too.
    """
    draw = np.random.default_rng([world.seed, 3])
    sellers = [
        [number for number, shop in enumerate(world.advertisers) if kind in shop.kinds] for kind in range(len(KINDS))
    ]
    number = 0
    while True:
        wanted = draw_wanted(world, draw)
        query = word_query(wanted, world.brand_names, int(draw.integers(WORDINGS)))
        for _ in range(ADS_PER_QUERY):
            ad = _draw_offer(wanted, LABELS[draw.integers(len(LABELS))], world, sellers, draw)
            yield _example(number, query, wanted, ad, world, draw, three_labels=three_labels)
            number += 1


def _example(
    number: int,
    query: str,
    wanted: Wanted,
    ad: AdFacts,
    world: World,
    draw: np.random.Generator,
    *,
    three_labels: bool,
) -> Example:
    judged = judge_pair(wanted, ad, world)
    written = LABELS[slip(LABELS.index(judged.label), len(LABELS), draw)]
    flags = {"location": judged.location, "quality": judged.quality} if three_labels else {}
    row = chat_row(
        f"simulated-{'labels' if three_labels else 'pair'}-{number}",
        query,
        shown_ad(ad, world),
        written,
        judged.reasoning,
        **flags,
    )
    return Example(row, best=(str(judged.label),), chances=(1 - SLIP,))


def shown_ad(ad: AdFacts, world: World) -> Ad:
    """Return what a prompt shows of an ad."""
    return Ad(title=ad.title, description=ad.description, seller=world.advertisers[ad.advertiser].name)


def draw_wanted(world: World, draw: np.random.Generator) -> Wanted:
    """Draw a wish for a kind and up to two things more."""
    kind = int(draw.integers(len(KINDS)))
    asked = set(draw.permutation(["price", "brand", "detail", "place"])[: draw.integers(3)].tolist())
    return Wanted(
        kind,
        price=int(draw.integers(len(PRICES))) if "price" in asked else None,
        brand=int(world.brands_of_kind[kind, draw.integers(BRANDS_PER_KIND)]) if "brand" in asked else None,
        detail=int(draw.integers(DETAILS)) if "detail" in asked else None,
        place=int(draw.integers(len(PLACES))) if "place" in asked else None,
    )


def _draw_offer(
    wanted: Wanted, label: Label, world: World, sellers: list[list[int]], draw: np.random.Generator
) -> AdFacts:
    """Draw an ad for which the rule gives ``label``: what must differ first, the rest as asked or at random."""
    wrong: set[str] = set()
    if label is Label.bad:
        wrong = {str(draw.choice(["spam", "kind", "department", *(["place"] if wanted.place is not None else [])]))}
    elif label is Label.fair:
        asked = [name for name in ("brand", "price", "detail") if getattr(wanted, name) is not None]
        possible = ["misspelt", "close", *asked]
        wrong = set(draw.permutation(possible)[: draw.integers(1, len(possible) + 1)].tolist())
    kind = _offered_kind(wanted.kind, wrong, draw)
    number = int(draw.choice(sellers[kind]))
    shop = replace(
        world.advertisers[number],
        price=_value(len(PRICES), wanted.price, "price" in wrong, draw),
        place=_offered_place(wanted.place, "place" in wrong, draw),
    )
    brands = [int(brand) for brand in world.brands_of_kind[kind]]
    if wanted.brand in brands and "brand" not in wrong:
        brands = [wanted.brand]
    elif wanted.brand is not None:
        brands = [brand for brand in brands if brand != wanted.brand]
    text = next((value for name, value in (("spam", SPAM), ("misspelt", MISSPELT)) if name in wrong), CLEAN)
    detail = _value(DETAILS, wanted.detail, "detail" in wrong, draw)
    return draw_ad(number, shop, kind, int(draw.choice(brands)), world.brand_names, draw, text=text, detail=detail)


def _offered_kind(kind: int, wrong: set[str], draw: np.random.Generator) -> int:
    if "close" in wrong:
        return close_kind(kind)
    if "kind" in wrong:  # of the same department, but no substitute
        return int(draw.choice([close_kind(kind) ^ 2, kind ^ 2]))
    if "department" in wrong:
        others = [other for other in range(len(KINDS)) if department_of(other) != department_of(kind)]
        return int(draw.choice(others))
    return kind


def _offered_place(asked: int | None, wrong: bool, draw: np.random.Generator) -> int | None:
    if wrong:
        return _value(len(PLACES), asked, True, draw)
    if draw.random() < 0.3:
        return None
    return _value(len(PLACES), asked, False, draw)


def _value(count: int, asked: int | None, wrong: bool, draw: np.random.Generator) -> int:
    if wrong:
        return int(draw.choice([value for value in range(count) if value != asked]))
    return int(draw.integers(count)) if asked is None else asked
