"""A matcher that knows words only (BM25): what it finds is easy, and what it misses needs understanding.

score(query, d) = sum over the query's words of idf * f (k1 + 1) / (f + k1 (1 - b + b |d| / mean |d|))
idf = log(1 + (N - n + 0.5) / (n + 0.5)),   f = count in d, n = documents with the word, k1 = 1.2, b = 0.75
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from megatron_ads.metrics.text_similarity import words_of

_K1, _B = 1.2, 0.75


class LexicalMatcher:
    """An index of documents, such as ads or keywords, by number."""

    def __init__(self, documents: Sequence[str]) -> None:
        """Index ``documents``."""
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
        for word in set(words_of(query)):
            postings = self._postings.get(word, ())
            idf = math.log(1 + (self._documents - len(postings) + 0.5) / (len(postings) + 0.5))
            for number, weight in postings:
                scores[number] += idf * weight
        return dict(scores)
