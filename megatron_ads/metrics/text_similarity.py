"""Embeddings of short texts that need no model: TF-IDF, reduced by a truncated SVD; and what is measured with them.

    tf-idf(word, text) = count * (log((1 + N) / (1 + texts with the word)) + 1), each text scaled to length 1
    embedding = tf-idf projected on the leading right singular vectors of the fitted texts, scaled to length 1

The axes of the projection come from the Gram matrix of the words, so memory is (texts + words) * words.

Shape suffixes: N = texts, W = words, D = dimensions.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class TextEmbedding:
    """A fitted embedding."""

    words: dict[str, int]
    """Column of every word that counts."""
    weights_W: NDArray[np.float64]
    """Inverse document frequencies."""
    axes_WD: NDArray[np.float64]

    def embed(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return one vector per text, (N, D), of length 1; of length 0 if the text has no known word."""
        return _unit(_unit(self._weighted(texts)) @ self.axes_WD)

    def _weighted(self, texts: Sequence[str]) -> NDArray[np.float64]:
        counts_NW = np.zeros((len(texts), len(self.words)))
        for row, text in enumerate(texts):
            for word, count in Counter(words_of(text)).items():
                if word in self.words:
                    counts_NW[row, self.words[word]] = count
        return counts_NW * self.weights_W


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without a plural s."""
    return [word.removesuffix("s") if len(word) > 3 else word for word in _WORD.findall(text.lower())]


def fit_embedding(texts: Sequence[str], *, dimensions: int = 64, most_words: int = 2048) -> TextEmbedding:
    """Fit on ``texts``; the ``most_words`` words that most texts have count, the others are ignored."""
    texts_with = Counter(word for text in texts for word in set(words_of(text)))
    chosen = sorted(texts_with, key=lambda word: (-texts_with[word], word))[:most_words]
    weights_W = np.log((1 + len(texts)) / (1 + np.asarray([texts_with[word] for word in chosen]))) + 1
    words = {word: column for column, word in enumerate(chosen)}
    plain = TextEmbedding(words=words, weights_W=weights_W, axes_WD=np.eye(len(words)))
    scaled_NW = _unit(plain._weighted(texts))
    values_W, vectors_WW = np.linalg.eigh(scaled_NW.T @ scaled_NW)
    leading = np.argsort(-values_W)[:dimensions]
    return TextEmbedding(words=words, weights_W=weights_W, axes_WD=vectors_WW[:, leading])


def mean_similarities(vectors_ND: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return each text's mean cosine similarity with the others, (N,); 1 for a text that is alone.

    Self-consistency of several candidates for one prompt: a candidate that the others do not resemble is suspect.
    """
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
