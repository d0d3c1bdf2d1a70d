"""Sentence encoders of the library sentence-transformers, which is optional: TF-IDF of ``text`` needs none."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_ads.errors import ConfigError

Embed = Callable[[Sequence[str]], NDArray[np.float64]]
"""One vector of length 1 (0 for a text without known words) per text, (N, D)."""


@lru_cache(maxsize=1)
def sentence_encoder(name: str, setting: str) -> Embed:
    """Return a model's embedding.

    Args:
        name: Of a model on the hub, or its folder.
        setting: Which names it, for messages.

    Raises:
        ConfigError: If sentence-transformers is not installed or cannot load it.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ConfigError(
            f"{setting} is {name!r}, but sentence-transformers is not installed. Install it (pip install "
            f"sentence-transformers), or leave {setting} out for TF-IDF."
        ) from None
    try:
        model = SentenceTransformer(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting} is {name!r}, which cannot be loaded: {error}") from None
    return lambda texts: np.asarray(model.encode(list(texts), normalize_embeddings=True), dtype=np.float64)
