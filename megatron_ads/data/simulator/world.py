"""What does not change in the simulated world: brands, advertisers, ads and their texts, and who buys what where.

Letters of array shapes: K kinds, A advertisers, D ads, P price levels.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_ads.data.simulator import vocabulary
from megatron_ads.errors import ConfigError

K, P = len(vocabulary.KINDS), len(vocabulary.PRICES)
BRANDS_PER_DEPARTMENT = 6
ADS_PER_OFFER = 2
"""Ads of one advertiser for one kind."""
DEFAULT_ADVERTISERS = 120

CLEAN, MISSPELT, SPAM = range(3)
TEXTS = (vocabulary.CLEAN_TEXTS, vocabulary.MISSPELT_TEXTS, vocabulary.SPAM_TEXTS)
_TEXT_SHARES = (0.8, 0.12, 0.08)
_WRONG_PRICE = 0.15
"""How much less often people convert with a shop of the other price level."""
_LOCAL_SHARE = 0.4


@dataclass(frozen=True, slots=True)
class Advertiser:
    """One shop."""

    name: str
    domain: str
    kinds: tuple[int, ...]
    """What it sells; the first is its main kind."""
    price: int
    place: int | None
    """None: everywhere."""


@dataclass(frozen=True, slots=True)
class AdFacts:
    """What one ad offers, and what it says."""

    advertiser: int
    kind: int
    brand: int
    price: int
    place: int | None
    detail: int
    text: int
    """``CLEAN``, ``MISSPELT`` or ``SPAM``."""
    title: str
    description: str
    url: str


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Everything that does not change from day to day."""

    seed: int
    brand_names: list[str]
    brands_of_kind: NDArray[np.int64]
    """(K, BRANDS_PER_KIND)"""
    advertisers: list[Advertiser]
    ads: list[AdFacts]
    queries: list[str]
    first_ad_AK: NDArray[np.int32]
    """First of the ``ADS_PER_OFFER`` ads of an advertiser for a kind; -1 where it does not sell it."""
    popularity_A: NDArray[np.float64]
    """Probability of an advertiser for somebody who looks for nothing in particular."""
    intent_KPA: NDArray[np.float64]
    """Probability of an advertiser for somebody of price level P who looks for a kind."""
    auction_KD: NDArray[np.float64]
    """Probability of an ad in any place of the results for a kind."""


def department_of(kind: int) -> int:
    """Return the department of a kind."""
    return kind // vocabulary.KINDS_PER_DEPARTMENT


Kinds = TypeVar("Kinds", int, NDArray[np.int64])


def close_kind(kind: Kinds) -> Kinds:
    """Return the kind that can stand in for this one, of an array of each."""
    return kind ^ 1


def draw_world(seed: int, *, advertisers: int = DEFAULT_ADVERTISERS) -> World:
    """Draw a world; the same seed and number of advertisers give the same one.

    Raises:
        ConfigError: If there are fewer advertisers than kinds of product.
    """
    if advertisers < K:
        raise ConfigError(f"advertisers is {advertisers}; the {K} kinds of product need at least one each.")
    draw = np.random.default_rng([seed, 0])
    brand_count = len(vocabulary.DEPARTMENTS) * BRANDS_PER_DEPARTMENT
    names = vocabulary.invent_names(brand_count + advertisers, draw)
    brand_names, shop_names = names[:brand_count], names[brand_count:]
    orders = [draw.permutation(BRANDS_PER_DEPARTMENT)[: vocabulary.BRANDS_PER_KIND] for _ in range(K)]
    brands_of_kind = np.stack(
        [department_of(kind) * BRANDS_PER_DEPARTMENT + order for kind, order in enumerate(orders)]
    )
    # Every advertiser has a main kind, all kinds in turn.
    main_kinds = np.concatenate([draw.permutation(K) for _ in range(-(-advertisers // K))])[:advertisers]
    shops = [_draw_advertiser(name, int(kind), draw) for name, kind in zip(shop_names, main_kinds, strict=True)]
    ads = [
        draw_ad(number, shop, kind, int(draw.choice(brands_of_kind[kind])), brand_names, draw)
        for number, shop in enumerate(shops)
        for kind in shop.kinds
        for _ in range(ADS_PER_OFFER)
    ]
    first_ad_AK = np.full((advertisers, K), -1, dtype=np.int32)
    for number, ad in reversed(list(enumerate(ads))):
        first_ad_AK[ad.advertiser, ad.kind] = number
    popularity_A = _normalized(draw.lognormal(0.0, 1.0, advertisers))
    queries = [
        vocabulary.word_query(vocabulary.wanted_by(query, brands_of_kind), brand_names, query % vocabulary.WORDINGS)
        for query in range(vocabulary.QUERY_COUNT)
    ]
    return World(
        seed=seed,
        brand_names=brand_names,
        brands_of_kind=brands_of_kind,
        advertisers=shops,
        ads=ads,
        queries=queries,
        first_ad_AK=first_ad_AK,
        popularity_A=popularity_A,
        intent_KPA=_intent(shops, popularity_A),
        auction_KD=_auction(ads, popularity_A),
    )


def _normalized(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    total: NDArray[np.float64] = weights / weights.sum(axis=-1, keepdims=True)
    return total


def _draw_advertiser(name: str, kind: int, draw: np.random.Generator) -> Advertiser:
    """Draw a shop that sells ``kind`` and, some of them, more from the same department."""
    others = [other for other in range(K) if department_of(other) == department_of(kind) and other != kind]
    more = draw.permutation(others)[: draw.choice(3, p=(0.4, 0.4, 0.2))]
    whole = f"{name} {draw.choice(vocabulary.DEPARTMENTS[department_of(kind)].shop_words)}"
    return Advertiser(
        name=whole,
        domain=whole.lower().replace(" ", "") + ".example",
        kinds=(kind, *(int(other) for other in more)),
        price=int(draw.integers(P)),
        place=int(draw.integers(len(vocabulary.PLACES))) if draw.random() < _LOCAL_SHARE else None,
    )


def draw_ad(
    number: int,
    shop: Advertiser,
    kind: int,
    brand: int,
    brand_names: list[str],
    draw: np.random.Generator,
    *,
    text: int | None = None,
    detail: int | None = None,
) -> AdFacts:
    """Draw an ad of a shop for a kind and word it; flaws of the text and the detail are drawn unless given."""
    text = int(draw.choice(3, p=_TEXT_SHARES)) if text is None else text
    detail = int(draw.integers(len(vocabulary.DEPARTMENTS[0].details))) if detail is None else detail
    sentences = ad_sentences(shop, kind, detail, text, draw)
    return AdFacts(
        advertiser=number,
        kind=kind,
        brand=brand,
        price=shop.price,
        place=shop.place,
        detail=detail,
        text=text,
        title=f"{brand_names[brand]} {pick(vocabulary.KINDS[kind].offered_as, draw)}",
        description=" ".join(sentences[index] for index in draw.permutation(len(sentences))),
        url=f"{shop.domain}/{vocabulary.KINDS[kind].name.replace(' ', '-')}",
    )


def ad_sentences(shop: Advertiser, kind: int, detail: int, text: int, draw: np.random.Generator) -> list[str]:
    """Return what an ad says of price, place and detail, and a sentence that is clean, misspelt or spam."""
    low, high = int(draw.integers(15, 60)), int(draw.integers(30, 99)) * 10
    where = pick(vocabulary.EVERYWHERE_OFFERED if shop.place is None else vocabulary.PLACES_OFFERED, draw)
    return [
        pick(vocabulary.PRICES_OFFERED[shop.price], draw).format(low=low, high=high),
        where if shop.place is None else where.format(place=vocabulary.PLACES[shop.place]),
        vocabulary.DEPARTMENTS[department_of(kind)].details[detail][1],
        pick(TEXTS[text], draw),
    ]


def pick(texts: tuple[str, ...], draw: np.random.Generator) -> str:
    """Return one of a few texts."""
    return texts[draw.integers(len(texts))]


def _intent(shops: list[Advertiser], popularity_A: NDArray[np.float64]) -> NDArray[np.float64]:
    sells_KA = np.array([[kind in shop.kinds for shop in shops] for kind in range(K)], dtype=np.float64)
    price_PA = np.array([[1.0 if shop.price == price else _WRONG_PRICE for shop in shops] for price in range(P)])
    return _normalized(sells_KA[:, None, :] * price_PA[None, :, :] * popularity_A)


_AUCTION_SAME, _AUCTION_CLOSE, _AUCTION_ANY = 0.7, 0.15, 0.15


def _auction(ads: list[AdFacts], popularity_A: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mix ads of the kind, of the kind that can stand in for it, and any; each by its advertiser's popularity."""
    kind_D = np.array([ad.kind for ad in ads])
    bid_D = popularity_A[[ad.advertiser for ad in ads]]
    of_kind_KD = _normalized((kind_D[None, :] == np.arange(K)[:, None]) * bid_D)
    close_KD = of_kind_KD[[close_kind(kind) for kind in range(K)]]
    return _AUCTION_SAME * of_kind_KD + _AUCTION_CLOSE * close_KD + _AUCTION_ANY * _normalized(bid_D)
