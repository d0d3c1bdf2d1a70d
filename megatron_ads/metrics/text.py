"""Measures of texts: form, overlap of word sets, variety, TF-IDF embeddings, a BM25 matcher, and perplexity.

Embedding: TF-IDF, reduced by a truncated SVD.

    tf-idf(word, text) = count * (log((1 + N) / (1 + texts with the word)) + 1), each text scaled to length 1
    embedding = tf-idf projected on the leading right singular vectors of the fitted texts, scaled to length 1

The axes of the projection come from the Gram matrix of the words, so memory is (texts + words) * words.

BM25:

    score(query, d) = sum over the query's words of idf * f (k1 + 1) / (f + k1 (1 - b + b |d| / mean |d|))
    idf = log(1 + (N - n + 0.5) / (n + 0.5)),   f = count in d, n = documents with the word, k1 = 1.2, b = 0.75

Generated queries (AdNanny, table 6, names them; the paper does not define them, so ours):

    distinct-n              different n-grams / all n-grams of the queries of one keyword, averaged over keywords
    click attribute ratio   1 - total variation distance between the attributes of queries and of clicked queries

Perplexity says how many equally likely tokens a model hesitates between, on average, over T target tokens:

    PPL = exp(-(1/T) sum_t log P(y_t | prompt, y_<t))

Shape suffixes: N = texts, W = words, D = dimensions.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ads.metrics.ranking import mean, same_name

_WORD = re.compile(r"\w+")
MAX_EXPONENT = 700.0
"""Largest mean loss, in nats, that is exponentiated: above about 709 a double overflows."""

Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TextEmbedding:
    """A fitted embedding."""

    counter: Any
    """``sklearn.feature_extraction.text.CountVectorizer`` of the words that count."""
    weights_W: NDArray[np.float64]
    """Inverse document frequencies."""
    axes_WD: NDArray[np.float64]

    def embed(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return one vector per text, (N, D), of length 1; of length 0 if the text has no known word."""
        return _unit(_unit(self.counter.transform(texts).toarray() * self.weights_W) @ self.axes_WD)


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without a plural s."""
    return [word.removesuffix("s") if len(word) > 3 else word for word in _WORD.findall(text.lower())]


def fit_embedding(texts: Sequence[str], *, dimensions: int = 64, max_words: int = 2048) -> TextEmbedding:
    """Fit on ``texts``; the ``max_words`` words that most texts have count, the others are ignored."""
    texts_with = Counter(word for text in texts for word in set(words_of(text)))
    chosen = sorted(texts_with, key=lambda word: (-texts_with[word], word))[:max_words]
    # "" is no word: texts without any get vectors of zeros, where scikit-learn would refuse an empty vocabulary.
    chosen = chosen or [""]
    counter = word_counter(chosen)
    weights_W = np.log((1 + len(texts)) / (1 + np.asarray([texts_with[word] for word in chosen]))) + 1
    scaled_NW = _unit(counter.transform(texts).toarray() * weights_W)
    values_W, vectors_WW = np.linalg.eigh(scaled_NW.T @ scaled_NW)
    leading = np.argsort(-values_W)[:dimensions]
    return TextEmbedding(counter, weights_W, axes_WD=vectors_WW[:, leading])


def word_counter(words: Sequence[str]) -> Any:
    """Return what counts these words in texts, in this order, as ``TextEmbedding`` needs it."""
    from sklearn.feature_extraction.text import CountVectorizer  # here: the import takes seconds

    return CountVectorizer(analyzer=words_of, vocabulary=list(words))


def mean_similarities(vectors_ND: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return each text's mean cosine similarity with the others, (N,); 1 for a text that is alone."""
    if len(vectors_ND) < 2:
        return np.ones(len(vectors_ND))
    similar_NN = vectors_ND @ vectors_ND.T
    means_N: NDArray[np.float64] = (similar_NN.sum(1) - np.diag(similar_NN)) / (len(vectors_ND) - 1)
    return means_N


def mean_pairwise_distance(vectors_ND: NDArray[np.float64]) -> float | None:
    """Return the mean of 1 - cosine over all pairs; None with fewer than two texts."""
    return float(1 - mean_similarities(vectors_ND).mean()) if len(vectors_ND) > 1 else None


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    scaled: NDArray[np.float64] = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
    return scaled


_K1, _B = 1.2, 0.75


class LexicalMatcher:
    """An index of documents, such as ads or keywords, by number."""

    def __init__(self, documents: Sequence[str]) -> None:
        self._postings: dict[str, list[tuple[int, float]]] = defaultdict(list)
        words_of_documents = [words_of(document) for document in documents]
        mean_length = sum(map(len, words_of_documents)) / max(len(documents), 1)
        for number, words in enumerate(words_of_documents):
            penalty = _K1 * (1 - _B + _B * len(words) / mean_length) if mean_length else _K1
            for word, count in Counter(words).items():
                self._postings[word].append((number, count * (_K1 + 1) / (count + penalty)))
        self._documents = len(documents)

    def best(self, query: str, k: int) -> list[int]:
        """Return the numbers of the ``k`` best documents that share a word with the query, the best first."""
        scores = self.scores(query)
        return sorted(scores, key=lambda number: (-scores[number], number))[:k]

    def scores(self, query: str) -> dict[int, float]:
        """Return the score of every document that shares a word with the query, by number."""
        scores: dict[int, float] = defaultdict(float)
        for word in dict.fromkeys(words_of(query)):  # in a fixed order: sums of floats depend on it
            postings = self._postings.get(word, ())
            idf = math.log(1 + (self._documents - len(postings) + 0.5) / (len(postings) + 0.5))
            for number, weight in postings:
                scores[number] += idf * weight
        return dict(scores)


def distinct_n(queries_of_keywords: Sequence[Sequence[str]], n: int) -> float | None:
    """Return the share of different n-grams of words; keywords without n-grams do not count. None if none has any."""
    shares = []
    for queries in queries_of_keywords:
        grams = [
            gram for query in queries for gram in zip(*(words_of(query)[start:] for start in range(n)), strict=False)
        ]
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return mean(shares)


def click_attribute_ratio(generated: Sequence[str], clicked: Sequence[str]) -> float | None:
    """Return how alike two distributions of attributes (such as price, brand, place) are; None if one is empty."""
    if not generated or not clicked:
        return None
    ours, theirs = Counter(generated), Counter(clicked)
    shares = ((ours[name] / len(generated), theirs[name] / len(clicked)) for name in ours.keys() | theirs.keys())
    apart = math.fsum(abs(own - other) for own, other in shares)  # exact: the order of a set is not always the same
    return 1 - apart / 2


def is_narrower(query: str, keyword: str) -> bool:
    """Return whether a query has a word that the keyword lacks: searchers have long and short names for one thing."""
    return bool(set(words_of(query)) - set(words_of(keyword)))


def near_duplicates(queries: Sequence[str]) -> int:
    """Return how many queries have the same words as an earlier one, in whatever order."""
    return len(queries) - len({frozenset(words_of(query)) for query in queries})


@dataclass(frozen=True, slots=True)
class Overlap:
    """Precision and recall of a predicted set."""

    precision: float
    recall: float

    @property
    def f1(self) -> float:
        """Harmonic mean; 0 if both are 0."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def overlap(truth: Iterable[str], predicted: Iterable[str]) -> Overlap:
    """Compare a predicted set with the true one. Two empty sets agree; an empty one against another does not."""
    true_set, predicted_set = set(map(same_name, truth)), set(map(same_name, predicted))
    if not true_set and not predicted_set:
        return Overlap(1.0, 1.0)
    shared = len(true_set & predicted_set)
    return Overlap(precision=shared / max(len(predicted_set), 1), recall=shared / max(len(true_set), 1))


def format_rates(texts: Sequence[str]) -> dict[str, float | None]:
    """Return the shares of answers with a closed ``<think>`` block, with text in it, and with text after it.

    All are None without answers.
    """
    blocks = [re.search(r"<think>(.*?)</think>(.*)", text, re.DOTALL) for text in texts]
    return {
        "think_tag_presence_rate": mean([block is not None for block in blocks]),
        "think_non_empty_rate": mean([block is not None and bool(block[1].strip()) for block in blocks]),
        "answer_non_empty_rate": mean([block is not None and bool(block[2].strip()) for block in blocks]),
    }


def perplexity(loss_sum: float, targets: int) -> float:
    """Return PPL of a loss summed over ``targets`` tokens, in nats; at most ``exp(MAX_EXPONENT)``."""
    return math.exp(min(loss_sum / targets, MAX_EXPONENT))


def perplexities(loss_sums: Vector, targets: Vector) -> Vector:
    """Return PPL from summed losses and counts of target tokens; always finite, the largest for a loss of NaN."""
    exponents = np.fmin(loss_sums / np.maximum(targets, 1), MAX_EXPONENT)  # fmin takes the other value for NaN
    result: Vector = np.exp(exponents)
    return result
