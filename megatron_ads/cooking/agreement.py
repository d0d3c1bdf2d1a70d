"""Do the candidates of a row say the same in different words? Those unlike the others go, and so do repetitions.

similarity(c) = mean over the row's other candidates of cos(e(c), e(other))

Two candidates that do not resemble each other both go: nothing says which is right. Source: AdNanny, section 3.4
(self-consistency by embedding similarity; different but valid perspectives are wanted, so repetitions go as well).
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ads.cooking.candidates import Candidate, Removed, by_row, passing
from megatron_ads.cooking.config import RejectConfig
from megatron_ads.errors import ConfigError
from megatron_ads.metrics.text import fit_embedding, mean_similarities

Embed = Callable[[Sequence[str]], NDArray[np.float64]]
"""One vector of length 1 (0 for a text without known words) per text, (N, D)."""

MOST_FITTED = 5000
"""Texts that TF-IDF is fitted on at most; the first ones."""
_ROUNDING = 1e-9


def embedder(config: RejectConfig, texts: Sequence[str], *, dimensions: int = 64) -> Embed:
    """Return what turns texts into vectors: TF-IDF fitted on ``texts``, or the model that the recipe names.

    Raises:
        ConfigError: If sentence-transformers is not installed or cannot load the model.
    """
    if config.embedding is None:
        return fit_embedding(list(texts[:MOST_FITTED]), dimensions=dimensions).embed
    model = load_encoder(config.embedding)
    return lambda sentences: np.asarray(model.encode(list(sentences), normalize_embeddings=True), dtype=np.float64)


@lru_cache(maxsize=1)
def load_encoder(name: str) -> Any:
    """Return a sentence-transformers model.

    Raises:
        ConfigError: If sentence-transformers is not installed or cannot load it.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ConfigError(
            f"reject.embedding is {name!r}, but sentence-transformers is not installed. Install it (pip install "
            "sentence-transformers), or set reject.embedding to null for TF-IDF."
        ) from None
    try:
        return SentenceTransformer(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"reject.embedding is {name!r}, which cannot be loaded: {error}") from None


def remove_disagreeing(candidates: Sequence[Candidate], embed: Embed, config: RejectConfig) -> None:
    """Remove, row by row, candidates unlike the others, then repetitions of an earlier one; note the similarities."""
    for group in by_row(passing(candidates)).values():
        if len(group) < 2:
            continue
        vectors_ND = embed([candidate.reasoning for candidate in group])
        for candidate, similarity in zip(group, mean_similarities(vectors_ND), strict=True):
            candidate.similarity = float(similarity)
            if config.min_similarity > 0 and similarity < config.min_similarity:
                candidate.remove(Removed.unlike_the_others, measured=f"similarity {similarity:.3f}")
        _remove_repetitions(group, vectors_ND, config.max_similarity)


def _remove_repetitions(group: Sequence[Candidate], vectors_ND: NDArray[np.float64], limit: float) -> None:
    if limit >= 1:
        return
    kept: list[int] = []
    for index, candidate in enumerate(group):
        if candidate.removed is not None:
            continue
        nearest = max(kept, key=lambda other: float(vectors_ND[index] @ vectors_ND[other]), default=None)
        if nearest is not None and vectors_ND[index] @ vectors_ND[nearest] > limit + _ROUNDING:
            candidate.remove(Removed.repeats_another, measured=f"candidate {group[nearest].number}")
        else:
            kept.append(index)
