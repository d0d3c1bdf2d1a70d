"""TF-IDF and SVD embeddings: against scikit-learn, and what similarity means with them."""

import numpy as np
import pytest
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from megatron_ads.metrics.text_similarity import (
    fit_embedding,
    mean_pairwise_distance,
    mean_similarities,
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


def test_only_the_most_frequent_words_count():
    embedding = fit_embedding(TEXTS, most_words=2)
    # "in", "paris", "hotel" and "shoe" are in three texts each: the first two by name.
    assert list(embedding.words) == ["hotel", "in"]


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
