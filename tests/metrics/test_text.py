"""Embeddings against scikit-learn; BM25, variety, overlap and form of texts by hand."""

import math

import numpy as np
import pytest
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from megatron_ads.metrics.text import (
    MAX_EXPONENT,
    LexicalMatcher,
    Overlap,
    click_attribute_ratio,
    distinct_n,
    fit_embedding,
    format_rates,
    is_narrower,
    mean_pairwise_distance,
    mean_similarities,
    near_duplicates,
    overlap,
    perplexities,
    perplexity,
    words_of,
)

TEXTS = [
    "running shoes for new runners",
    "cushioned running shoes",
    "trail shoes and socks",
    "cheap hotel in paris",
    "luxury hotel in central paris",
    "hotel near the station in paris",
]


def test_words_are_lower_case_without_a_plural_s():
    assert words_of("Running Shoes, gas, toys & USB-C") == ["running", "shoe", "gas", "toy", "usb", "c"]


def test_with_all_dimensions_the_cosines_are_those_of_tf_idf():
    # As many axes as words: the projection is a rotation, which changes no cosine.
    mine = fit_embedding(TEXTS, dimensions=100).embed(TEXTS)
    theirs = TfidfVectorizer(analyzer=words_of).fit_transform(TEXTS).toarray()
    assert np.allclose(mine @ mine.T, theirs @ theirs.T)


def test_with_few_dimensions_the_cosines_are_those_of_a_truncated_svd():
    mine = fit_embedding(TEXTS, dimensions=3).embed(TEXTS)
    tfidf = TfidfVectorizer(analyzer=words_of).fit_transform(TEXTS)
    theirs = TruncatedSVD(3, algorithm="arpack", random_state=0).fit_transform(tfidf)
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    assert mine.shape == (6, 3)
    assert np.allclose(mine @ mine.T, theirs @ theirs.T)


def test_a_text_without_known_words_has_no_direction():
    (vector,) = fit_embedding(TEXTS, dimensions=3).embed(["zebra"])
    assert vector.tolist() == [0, 0, 0]
    assert not fit_embedding(["?", "!"]).embed(["?"]).any()
    assert fit_embedding(TEXTS, dimensions=3).embed([]).shape == (0, 3)


def test_only_the_most_frequent_words_count():
    embedding = fit_embedding(TEXTS, max_words=2)
    # "in", "paris", "hotel" and "shoe" are in three texts each: the first two by name.
    assert list(embedding.counter.get_feature_names_out()) == ["hotel", "in"]


def test_the_candidate_that_disagrees_is_the_least_similar():
    candidates = ["cheap hotel in paris", "hotel in central paris", "running shoes"]
    similarities = mean_similarities(fit_embedding(TEXTS).embed(candidates))
    assert int(np.argmin(similarities)) == 2


def test_mean_similarity_and_distance_by_hand():
    # Cosines: 1 and 2 are the same (1), 3 is orthogonal to both (0).
    vectors = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert mean_similarities(vectors).tolist() == [0.5, 0.5, 0.0]
    assert mean_pairwise_distance(vectors) == pytest.approx(1 - 1 / 3)
    assert mean_similarities(vectors[:1]).tolist() == [1.0]
    assert mean_pairwise_distance(vectors[:1]) is None


def test_equal_queries_are_at_no_distance_and_unlike_ones_at_distance_one():
    embedding = fit_embedding(["red shoe", "blue hat"])
    assert mean_pairwise_distance(embedding.embed(["red shoe", "red shoes"])) == pytest.approx(0)
    assert mean_pairwise_distance(embedding.embed(["red shoe", "blue hat"])) == pytest.approx(1)


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


def test_format_rates_by_hand():
    texts = [
        "<think>why</think>Acme",  # all three
        "<think> </think>Acme",  # an empty block
        "<think>why</think> ",  # no answer
        "<think>why",  # never closed
        "Acme",
    ]
    assert format_rates(texts) == {
        "think_tag_presence_rate": 3 / 5,
        "think_non_empty_rate": 2 / 5,
        "answer_non_empty_rate": 2 / 5,
    }
    assert set(format_rates([]).values()) == {None}


def test_overlap_by_hand():
    # 2 of the 3 predicted are true, 2 of the 4 true are predicted: F1 = 2 * (2/3) * (1/2) / (2/3 + 1/2) = 4/7
    found = overlap(["Shoes", "hats", "bags", "coats"], ["shoes ", "HATS", "toys"])
    assert (found.precision, found.recall) == (2 / 3, 1 / 2)
    assert found.f1 == pytest.approx(4 / 7)


def test_empty_sets():
    assert overlap([], []) == Overlap(1.0, 1.0)
    assert overlap(["a"], []).f1 == 0.0
    assert overlap([], ["a"]).f1 == 0.0


def test_perplexity_is_per_target_token_and_always_finite():
    # 2 tokens of loss ln 4 each -> 4; a loss of 10^6 on one token is capped, not infinite.
    values = perplexities(np.array([2 * math.log(4), 1e6, math.nan]), np.array([2.0, 1.0, 1.0]))
    assert values[0] == pytest.approx(4.0)
    assert np.isfinite(values).all() and values[1] == values[2]


def test_one_perplexity_is_that_of_many_and_never_overflows() -> None:
    assert perplexity(2 * math.log(4), 2) == pytest.approx(4)
    assert perplexity(1e6, 2) == math.exp(MAX_EXPONENT)
