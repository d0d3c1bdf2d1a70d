"""Measures of generated queries, each by hand."""

import math

import pytest

from megatron_ads.metrics.generated_queries import (
    click_attribute_ratio,
    difficulty,
    distinct_n,
    diversity,
    is_narrower,
    near_duplicates,
    relevance,
)
from megatron_ads.metrics.lexical_matcher import LexicalMatcher
from megatron_ads.metrics.text_similarity import fit_embedding


def test_relevance_is_what_the_judge_says():
    def judge(keyword: str, query: str) -> bool:
        return keyword in query

    assert relevance([("laptop", "gaming laptop"), ("laptop", "desk")], judge) == 0.5
    assert relevance([], judge) is None


def test_equal_queries_have_no_diversity_and_unlike_ones_have_all():
    embedding = fit_embedding(["red shoe", "blue hat"])
    assert diversity([["red shoe", "red shoes"]], embedding) == pytest.approx(0)
    assert diversity([["red shoe", "blue hat"]], embedding) == pytest.approx(1)
    # One keyword of each kind: the mean; a keyword with a single query does not count.
    both = [["red shoe", "red shoes"], ["red shoe", "blue hat"], ["blue hat"]]
    assert diversity(both, embedding) == pytest.approx(0.5)
    assert diversity([["blue hat"]], embedding) is None


def test_distinct_n_by_hand():
    # Words: red shoe red hat -> 3 of 4; pairs: (red shoe), (red hat) -> 2 of 2; triples: none.
    assert distinct_n([["red shoes", "red hat"]], 1) == 3 / 4
    assert distinct_n([["red shoes", "red hat"]], 2) == 1.0
    assert distinct_n([["red shoes", "red hat"]], 3) is None


def test_bm25_by_hand():
    # Two documents of two and four words, mean 3. "shoe" is in both: idf = log(1 + 0.5 / 2.5) = log 1.2.
    # Two words: 1 * 2.2 / (1 + 1.2 (0.25 + 0.75 * 2/3)) = 2.2 / 1.9; four: 2.2 / (1 + 1.2 (0.25 + 1)) = 2.2 / 2.5.
    matcher = LexicalMatcher(["red shoe", "blue shoe for rain"])
    scores = matcher.scores("shoes")
    assert scores == {0: pytest.approx(math.log(1.2) * 2.2 / 1.9), 1: pytest.approx(math.log(1.2) * 2.2 / 2.5)}
    assert matcher.best("shoes", 2) == [0, 1]
    assert matcher.best("rain shoe", 1) == [1]
    assert matcher.best("hat", 2) == []


def test_difficulty_is_what_a_matcher_of_words_misses():
    matcher = LexicalMatcher(["laptop computer", "running shoes"])
    assert difficulty([("cheap laptop", 0), ("notebook under 1000", 0)], matcher) == 0.5
    assert difficulty([], matcher) is None


def test_click_attribute_ratio_is_one_minus_the_distance_of_the_shares():
    # price 1/2 against 1/4, brand 1/2 against 1/2, place 0 against 1/4: 1 - (1/4 + 0 + 1/4) / 2 = 3/4
    assert click_attribute_ratio(["price", "brand"], ["price", "brand", "brand", "place"]) == 0.75
    assert click_attribute_ratio(["a"], ["b"]) == 0.0
    assert click_attribute_ratio([], ["b"]) is None


@pytest.mark.parametrize(
    ("query", "narrower"),
    [
        ("gaming laptop computer", True),
        ("gaming notebook", True),
        ("laptop computers", False),  # says nothing more
        ("laptop", False),  # broader
        ("ultrabook", True),  # fewer words can say more
    ],
)
def test_a_narrower_query_adds_a_word(query: str, narrower: bool):
    assert is_narrower(query, "laptop computer") is narrower


def test_near_duplicates_have_the_same_words_in_any_order():
    assert near_duplicates(["red shoes", "shoe red", "red hat"]) == 1
