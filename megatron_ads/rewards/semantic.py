"""Reward of answers whose words may differ from the true ones: the cosine of their embeddings.

    R = cos(e(said), e(true)), 0 for an answer that cannot be read          [Taiji, eq. 3]

e is TF-IDF and SVD of ``metrics/text.py``, fitted to the texts of a file, or any model of sentence-transformers (Taiji
has Qwen3-Embedding-0.6B). Without either, TF-IDF is fitted to the texts of each group by itself: a value then depends
on nothing but its group, and so not on how a job is laid out or where it was resumed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from megatron_ads.errors import require
from megatron_ads.metrics.encoder import Embed, sentence_encoder
from megatron_ads.metrics.text import fit_embedding
from megatron_ads.rewards.answers import true_text
from megatron_ads.rewards.documents import read_documents
from megatron_ads.rewards.reward import Unit, refuse_idle
from megatron_ads.rollouts import Rollout
from megatron_ads.tasks.answer_texts import said_text

_MOST_WORDS_OF_A_GROUP = 512


@dataclass(kw_only=True, slots=True)
class Semantic:
    """Judges rows of every task; what is compared is the answer without its reasoning and markup."""

    unit: ClassVar[Unit] = Unit.group

    model: str = ""
    """A model of sentence-transformers, by name or folder; empty: TF-IDF."""
    texts: str = ""
    """File of the texts that TF-IDF is fitted to; empty: those of each group."""
    text_column: str = "text"
    """Which column of ``texts`` holds them."""
    dimensions: int = 64
    """Of TF-IDF's SVD, at most."""

    _embed: Embed | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Load the model or fit the embedding, before there are any rollouts."""
        require(
            not (self.model and self.texts),
            f"semantic has model {self.model!r} and texts {self.texts!r}, which only TF-IDF is fitted to. Remove one.",
        )
        refuse_idle("semantic", self, "text_column", idle=not self.texts, why="without texts")
        refuse_idle("semantic", self, "dimensions", idle=bool(self.model), why="with a model")
        require(self.dimensions > 0, f"semantic has dimensions = {self.dimensions}; it must be at least 1.")
        if self.model:
            self._embed = sentence_encoder(self.model, "semantic's setting model")
        elif self.texts:
            texts = [text for (text,) in read_documents(self.texts, [self.text_column], "semantic's setting texts")]
            self._embed = fit_embedding(texts, dimensions=self.dimensions).embed

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return R of each answer to one prompt."""
        said = [said_text(rollout.row, rollout.text) for rollout in rollouts]
        true = [true_text(rollout.row) for rollout in rollouts]
        embed = self._embed
        if embed is None:
            fitted = [*dict.fromkeys(true), *said]
            embed = fit_embedding(fitted, dimensions=self.dimensions, max_words=_MOST_WORDS_OF_A_GROUP).embed
        said_ND, true_ND = embed(said), embed(true)
        cosines_N = np.einsum("nd,nd->n", said_ND, true_ND)
        return [float(cosine) if text else 0.0 for cosine, text in zip(cosines_N, said, strict=True)]
