"""Rows about texts: query-ad pairs, queries for keywords, comparisons of two systems' queries, better ads.

The labels of the pairs are a simulated rater's; the three are about equally frequent.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count

import numpy as np

from megatron_ads.data.simulator.judging import SLIP, Example, detail_words, judge_pair, slip
from megatron_ads.data.simulator.vocabulary import (
    BRANDS_PER_KIND,
    DETAILS,
    KINDS,
    PLACES,
    PRICES,
    WORDINGS,
    Wanted,
    word_query,
)
from megatron_ads.data.simulator.world import (
    CLEAN,
    MISSPELT,
    SPAM,
    TEXTS,
    AdFacts,
    World,
    ad_sentences,
    close_kind,
    department_of,
    draw_ad,
    pick,
)
from megatron_ads.tasks import ad_rewriting, model_comparison, query_generation
from megatron_ads.tasks.model_comparison import Assessment, Risk, SharedRequest, Verdict
from megatron_ads.tasks.prompts import Ad
from megatron_ads.tasks.query_generation import GeneratedQuery, KeywordBrief
from megatron_ads.tasks.relevance import Label, chat_row

ADS_PER_QUERY = 3
LABELS = tuple(Label)


def pair_examples(world: World, *, three_labels: bool) -> Iterator[Example]:
    """Yield examples without end, ``ADS_PER_QUERY`` to each query drawn; a query's text may come up again.

    With ``three_labels`` a row asks for the place and the ad's writing, too.
    """
    draw = np.random.default_rng([world.seed, 3])
    name = "labels" if three_labels else "pair"
    sellers = [
        [place for place, shop in enumerate(world.advertisers) if kind in shop.kinds] for kind in range(len(KINDS))
    ]
    for number in count():
        if number % ADS_PER_QUERY == 0:
            wanted = draw_wanted(world, draw)
            query = word_query(wanted, world.brand_names, int(draw.integers(WORDINGS)))
        ad = _draw_offer(wanted, LABELS[draw.integers(len(LABELS))], world, sellers, draw)
        judged = judge_pair(wanted, ad, world)
        written = LABELS[slip(LABELS.index(judged.label), len(LABELS), draw)]
        flags = {"location": judged.location, "quality": judged.quality} if three_labels else {}
        shown = shown_ad(ad, world)
        row = chat_row(f"simulated-{name}-{number}", query, shown, written, judged.reasoning, **flags)
        yield Example(row, best=(str(judged.label),), chances=(1 - SLIP,))


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
    price = _value(len(PRICES), wanted.price, "price" in wrong, draw)
    everywhere = "place" not in wrong and draw.random() < 0.3
    place = None if everywhere else _value(len(PLACES), wanted.place, "place" in wrong, draw)
    shop = replace(world.advertisers[number], price=price, place=place)
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
    return int(draw.choice(_other_departments(kind))) if "department" in wrong else kind


def _other_departments(kind: int) -> list[int]:
    """Return the kinds of product of the other departments."""
    return [other for other in range(len(KINDS)) if department_of(other) != department_of(kind)]


def _value(values: int, asked: int | None, wrong: bool, draw: np.random.Generator) -> int:
    if wrong:
        return int(draw.choice([value for value in range(values) if value != asked]))
    return int(draw.integers(values)) if asked is None else asked


QUERIES_WANTED = 3
_ASPECTS = {"price": len(PRICES), "brand": BRANDS_PER_KIND, "detail": DETAILS, "place": len(PLACES)}
"""What a query may add to a keyword, and how many choices there are of it."""


def query_examples(world: World) -> Iterator[Example]:
    """Yield keywords, half of them with an ad whose facts the queries take up; the target keeps every rule."""
    draw = np.random.default_rng([world.seed, 5])
    for number in count():
        keyword = _draw_keyword(world, draw)
        ad = _ad_for(keyword, world, draw) if draw.random() < 0.5 else None
        text = word_query(keyword, world.brand_names, int(draw.integers(WORDINGS)))
        brief = KeywordBrief(text, None if ad is None else shown_ad(ad, world), QUERIES_WANTED)
        aspects = draw.permutation([name for name in _ASPECTS if getattr(keyword, name) is None])
        queries = [_narrow(keyword, aspect, ad, world, draw) for aspect in aspects][:QUERIES_WANTED]
        reasoning = f"The keyword is about {KINDS[keyword.kind].name}. Each query adds one thing to it."
        row = query_generation.chat_row(f"simulated-keyword-{number}", brief, queries, reasoning)
        yield Example(row, best=(row.target,), chances=(1.0,))


def _draw_keyword(world: World, draw: np.random.Generator) -> Wanted:
    """Draw what advertisers bid on: a kind, or a kind and a brand or price level."""
    kind = int(draw.integers(len(KINDS)))
    more = draw.integers(3)
    if more == 1:
        return Wanted(kind, brand=int(world.brands_of_kind[kind, draw.integers(BRANDS_PER_KIND)]))
    return Wanted(kind, price=int(draw.integers(len(PRICES)))) if more == 2 else Wanted(kind)


def _ad_for(keyword: Wanted, world: World, draw: np.random.Generator) -> AdFacts | None:
    """Return an ad that keeps what the keyword asks for, if there is one."""
    fitting = [
        ad
        for ad in world.ads
        if ad.kind == keyword.kind and keyword.brand in (None, ad.brand) and keyword.price in (None, ad.price)
    ]
    return fitting[int(draw.integers(len(fitting)))] if fitting else None


def _narrow(
    keyword: Wanted, aspect: str, ad: AdFacts | None, world: World, draw: np.random.Generator
) -> GeneratedQuery:
    """Add one thing to a keyword: the ad's where there is an ad that has it, else any."""
    given = None if ad is None else getattr(ad, aspect)
    value = int(draw.integers(_ASPECTS[aspect])) if given is None else given
    if aspect == "brand" and given is None:
        value = int(world.brands_of_kind[keyword.kind, value])
    wanted = replace(keyword, **{aspect: value})
    words = {
        "price": f"{PRICES[value % len(PRICES)]} price level",
        "brand": f"brand {world.brand_names[value]}",
        "detail": detail_words(keyword.kind, value % DETAILS),
        "place": f"in {PLACES[value % len(PLACES)]}",
    }[aspect]
    source = "adds" if given is None else "from the ad"
    return GeneratedQuery(word_query(wanted, world.brand_names, int(draw.integers(WORDINGS))), f"{source}: {words}")


_QUALITIES = ("off topic", "substitute", "nothing new", "narrower")
"""Of a query for a keyword, from the worst to the best."""
_RISKS = (Risk.high, Risk.low, Risk.none, Risk.none)


def comparison_examples(world: World) -> Iterator[Example]:
    """Yield a keyword and the queries that two systems of different quality wrote for it."""
    draw = np.random.default_rng([world.seed, 6])
    verdicts = tuple(Verdict)
    for number in count():
        keyword = _draw_keyword(world, draw)
        current, new = int(draw.integers(len(_QUALITIES))), int(draw.integers(len(_QUALITIES)))
        text = word_query(keyword, world.brand_names, int(draw.integers(WORDINGS)))
        shared = SharedRequest(
            f"a query for the keyword: {text}",
            current=_write_query(keyword, current, world, draw),
            new=_write_query(keyword, new, world, draw),
        )
        true = 1 + int(new > current) - int(new < current)
        good, words = new >= 2, _QUALITIES[new]
        assessment = Assessment(
            strengths=("on topic", words) if new == 3 else ("on topic",) if good else (),
            weaknesses=() if new == 3 else (words,),
            risk=_RISKS[new],
            verdict=verdicts[slip(true, len(verdicts), draw)],
            reasoning=f"Current: {_QUALITIES[current]}. New: {words}.",
        )
        row = model_comparison.chat_row(f"simulated-comparison-{number}", shared, assessment, group=text)
        yield Example(row, best=(str(verdicts[true]),), chances=(1 - SLIP,))


def _write_query(keyword: Wanted, quality: int, world: World, draw: np.random.Generator) -> str:
    """Return what a system wrote that reaches ``quality``."""
    wording = int(draw.integers(WORDINGS))
    if quality == 3:
        free = [name for name in ("detail", "place") if getattr(keyword, name) is None]
        return _narrow(keyword, str(draw.choice(free)), None, world, draw).text
    if quality == 2:
        return word_query(keyword, world.brand_names, wording)
    kind = close_kind(keyword.kind) if quality == 1 else int(draw.choice(_other_departments(keyword.kind)))
    return word_query(Wanted(kind, price=keyword.price), world.brand_names, wording)


_GOALS = ("clear and correct writing", "emphasise the price", "emphasise the place")


def rewriting_examples(world: World) -> Iterator[Example]:
    """Yield flawed ads, their clean rewrites and the other words that searchers have for the same thing."""
    draw = np.random.default_rng([world.seed, 7])
    for number in count():
        ad = world.ads[int(draw.integers(len(world.ads)))]
        shop = world.advertisers[ad.advertiser]
        flaw = int(draw.choice((MISSPELT, SPAM)))
        price, where, detail, flawed = ad_sentences(shop, ad.kind, int(draw.integers(DETAILS)), flaw, draw)
        goal = int(draw.integers(len(_GOALS)))
        facts = {0: [detail, price, where], 1: [price, detail, where], 2: [where, detail, price]}[goal]
        shuffled = [price, where, detail, flawed]
        shown = Ad(ad.title, " ".join(shuffled[place] for place in draw.permutation(len(shuffled))), seller=shop.name)
        first, *others = (KINDS[ad.kind].asked_as[place] for place in draw.permutation(WORDINGS))
        rewrite = ad_rewriting.Rewrite(
            title=ad.title,
            text=" ".join([*facts, pick(TEXTS[CLEAN], draw)]),
            rationale=f"Replaced: {flawed} First comes what the goal asks for.",
            keywords=tuple(others),
            reasoning=f"{'Spam' if flaw == SPAM else 'Misspelt'}: {flawed} It is about {KINDS[ad.kind].name}.",
        )
        brief = ad_rewriting.RewriteBrief(shown, keywords=(first,), goal=_GOALS[goal])
        row = ad_rewriting.chat_row(f"simulated-rewrite-{number}", brief, rewrite)
        yield Example(row, best=(row.target,), chances=(1.0,))
