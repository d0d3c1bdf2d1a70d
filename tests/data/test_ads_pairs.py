"""The built-in pairs: the labels follow from the rule, by an implementation of its own that reads only the texts."""

import re
from collections import Counter
from itertools import islice

import pytest

from megatron_ads.data.ads_pairs import (
    BRANDS,
    CATEGORIES,
    PLACES,
    PRICES_ASKED,
    PRICES_OFFERED,
    TEXTS,
    Offered,
    Price,
    QueryIntent,
    Text,
    builtin_rows,
    generate_pairs,
    judge,
)
from megatron_ads.metrics.classification import binary_metrics, majority_predictions
from megatron_ads.tasks.relevance import BAD_VIEW, Label, RelevanceJudgement, parse

SHOES, HOTELS = CATEGORIES[0], CATEGORIES[2]


def label_from_texts(prompt: str) -> str:
    """Judge a pair from what the model sees, by looking words up."""
    query, title, text = (re.search(rf"^{name}: (.*)$", prompt, re.MULTILINE)[1] for name in ("Query", "Ad", "Text"))
    asked_category = max(
        ((surface, category.name) for category in CATEGORIES for surface in category.asked_as if surface in query),
        key=lambda found: len(found[0]),
    )[1]
    offered_category = next(
        category.name for category in CATEGORIES if any(word in title for word in category.offered_as)
    )
    asked_place = next((place for place in PLACES if place.lower() in query.split()), None)
    asked_brand = next((brand for brand in BRANDS if brand.lower() in query.split()), None)
    asked_price = next((p for p, words in PRICES_ASKED.items() if any(query.startswith(word) for word in words)), None)
    if any(spam in text for spam in TEXTS[Text.spam]) or asked_category != offered_category:
        return "Bad"
    if asked_place is not None and asked_place not in text:
        return "Bad"
    offered_price = next(p for p, words in PRICES_OFFERED.items() if any(word in text for word in words))
    if any(flaw in text for flaw in TEXTS[Text.misspelt]) or asked_brand not in (None, title.split()[0]):
        return "Fair"
    return "Good" if asked_price in (None, offered_price) else "Fair"


def test_every_label_follows_from_the_texts_by_the_rule():
    rows = builtin_rows(2000)
    wrong = [row.id for row in rows if label_from_texts(row.messages[0].content) != row.label]
    assert wrong == []


def test_target_carries_the_label_after_reasoning():
    for row in builtin_rows(300):
        judgement = parse(row.target)
        assert isinstance(judgement, RelevanceJudgement)
        assert judgement.label == row.label


@pytest.mark.parametrize(
    ("wanted", "offered", "label", "last_step"),
    [
        (QueryIntent(SHOES), Offered(SHOES, "Norvik", Price.cheap, "Leeds"), Label.good, "agree."),
        (QueryIntent(SHOES), Offered(HOTELS, "Norvik", Price.cheap, "Leeds"), Label.bad, "differ."),
        (QueryIntent(SHOES), Offered(SHOES, "Norvik", Price.cheap, "Leeds", Text.spam), Label.bad, "Text: spam."),
        (QueryIntent(SHOES), Offered(SHOES, "Norvik", Price.cheap, "Leeds", Text.misspelt), Label.fair, "agree."),
        (QueryIntent(SHOES, place="Leeds"), Offered(SHOES, "Norvik", Price.cheap, "Miami"), Label.bad, "differ."),
        (QueryIntent(SHOES, brand="Fjord"), Offered(SHOES, "Norvik", Price.cheap, "Leeds"), Label.fair, "differ."),
        (QueryIntent(SHOES, price=Price.premium), Offered(SHOES, "Fjord", Price.cheap, "Leeds"), Label.fair, "differ."),
        (QueryIntent(SHOES, brand="Fjord"), Offered(HOTELS, "Norvik", Price.cheap, "Leeds"), Label.bad, "differ."),
    ],
    ids=["all", "category", "spam", "misspelt", "place", "brand", "price", "category-before-brand"],
)
def test_rule_by_hand(wanted: QueryIntent, offered: Offered, label: Label, last_step: str):
    judged, reasoning = judge(wanted, offered)
    assert judged is label
    assert reasoning.endswith(last_step)


def test_same_seed_same_rows_and_another_seed_others():
    assert builtin_rows(200, seed=3) == builtin_rows(200, seed=3)
    assert builtin_rows(200, seed=3) != builtin_rows(200, seed=4)
    assert builtin_rows(200)[:50] == builtin_rows(50)


def test_labels_are_equally_frequent_so_the_majority_baseline_is_one_half():
    truths = [row.label or "" for row in builtin_rows(6000)]
    shares = {label: count / 6000 for label, count in Counter(truths).items()}
    # Standard error of a share of one third over 6000 rows: sqrt(1/3 * 2/3 / 6000) = 0.006.
    assert all(abs(share - 1 / 3) < 4 * 0.006 for share in shares.values())
    assert binary_metrics(truths, majority_predictions(truths), BAD_VIEW)["balanced_accuracy"] == 0.5


def test_texts_vary_and_ads_are_worded_unlike_queries():
    pairs = list(islice(generate_pairs(0), 6000))
    assert len({pair.query for pair in pairs}) > 1000
    assert len({(pair.query, pair.ad) for pair in pairs}) > 5500
    good = [pair for pair in pairs if judge(pair.wanted, pair.offered)[0] is Label.good]
    unlike = sum(pair.wanted.category.name not in f"{pair.query} {pair.ad.title}".lower() for pair in good)
    assert unlike / len(good) > 0.5
