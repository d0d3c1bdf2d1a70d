"""Sentence encoders of the library sentence-transformers, which is optional: TF-IDF of ``text`` needs none."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_ads.errors import ConfigError

Embed = Callable[[Sequence[str]], NDArray[np.float64]]
"""One vector of length 1 (0 for a text without known words) per text, (N, D)."""


def sentence_encoder(name: str, setting: str) -> Embed:
    """Return a model's embedding. The latest model is kept, and loaded again only if its content is another.

    Args:
        name: Of a model on the hub, or its folder.
        setting: Which names it, for messages.

    Raises:
        ConfigError: If sentence-transformers is not installed or cannot load it.
    """
    try:
        return _load(name, _content_of(name))
    except ImportError:
        raise ConfigError(
            f"{setting} is {name!r}, but sentence-transformers is not installed. Install it (pip install "
            f"sentence-transformers), or leave {setting} out for TF-IDF."
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting} is {name!r}, which cannot be loaded: {error}") from None


@lru_cache(maxsize=1)
def _load(name: str, content: tuple[str, ...]) -> Embed:
    """Return a model's embedding; ``content`` tells models apart that have the same name at different times."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(name)
    return lambda texts: np.asarray(model.encode(list(texts), normalize_embeddings=True), dtype=np.float64)


def _content_of(name: str) -> tuple[str, ...]:
    """Return what changes with a model's weights: of a folder its files as they are, of the hub the revision here."""
    folder = Path(name)
    if folder.is_dir():
        files = sorted(file for file in folder.resolve().rglob("*") if file.is_file())
        return tuple(f"{file} {(stat := file.stat()).st_size} {stat.st_mtime_ns}" for file in files)
    from huggingface_hub import try_to_load_from_cache  # here, as models are few and it takes a while

    on_hub = name if "/" in name else f"sentence-transformers/{name}"
    return (str(try_to_load_from_cache(on_hub, "modules.json")),)  # a file below snapshots/REVISION, or None
