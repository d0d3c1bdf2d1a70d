"""Reward of a generated query: how well a search with it finds the documents that the row calls relevant.

Over the first k documents found, with R relevant ones in the corpus:

    NDCG@k   = sum over relevant r <= k of 1 / log2(1 + r) / sum over r = 1..min(k, R) of 1 / log2(1 + r)
    recall@k = relevant documents among the first k / R

The search is BM25 of ``metrics/text.py``, or the cosine of embeddings. Of several queries in one answer the mean
counts; an answer that cannot be read finds nothing.

Source: Rec-R1 (arXiv:2503.24289).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import fmean
from typing import ClassVar

import numpy as np

from megatron_ads.data.simulator.text_examples import shown_ad
from megatron_ads.data.simulator.world import draw_world
from megatron_ads.errors import DataError, require
from megatron_ads.metrics.encoder import Embed, sentence_encoder
from megatron_ads.metrics.text import LexicalMatcher, fit_embedding
from megatron_ads.rewards.documents import read_documents
from megatron_ads.rewards.reward import Unit, refuse_idle
from megatron_ads.rollouts import Rollout
from megatron_ads.rows import ChatRow, JsonValue
from megatron_ads.tasks import query_generation
from megatron_ads.tasks.answer_texts import said_text
from megatron_ads.tasks.registry import read_answer

Search = Callable[[str, int], Sequence[int]]
"""Takes a query and k; returns the numbers of the best documents, the best first."""


class RetrievalMetric(StrEnum):
    """What a search is worth."""

    ndcg = "ndcg"
    recall = "recall"


class Index(StrEnum):
    """How documents are found."""

    bm25 = "bm25"
    dense = "dense"


@dataclass(kw_only=True, slots=True)
class Retrieval:
    """Judges rows that say which documents are relevant."""

    unit: ClassVar[Unit] = Unit.sample

    corpus: str = ""
    """File of documents; empty: the ads of the simulated business."""
    seed: int = 0
    """Of the simulated business, as ``data.seed``."""
    id_column: str = "id"
    """Of ``corpus``, as ``text_column``."""
    text_column: str = "text"
    relevant: str = "ad"
    """Fact with the ids of a row's documents: a text, a list of texts, or an ad, whose id is its title."""
    metric: str = "ndcg"
    """``ndcg`` or ``recall``."""
    k: int = 10
    """Documents found that count."""
    index: str = "bm25"
    """``bm25``, or ``dense`` for embeddings."""
    model: str = ""
    """``dense``: a model of sentence-transformers; empty: TF-IDF and SVD, fitted to the corpus."""

    _numbers: dict[str, list[int]] = field(init=False, default_factory=dict)
    """Of the documents with an id."""
    _search: Search = field(init=False, default=lambda query, k: ())

    def __post_init__(self) -> None:
        """Index the corpus."""
        for name, choices in (("metric", RetrievalMetric), ("index", Index)):
            value = getattr(self, name)
            require(value in list(choices), f"retrieval has {name} = {value!r}; known: {', '.join(choices)}.")
        require(self.k > 0, f"retrieval has k = {self.k}; it must be at least 1.")
        refuse_idle("retrieval", self, "model", idle=self.index != Index.dense, why=f"with index {self.index}")
        refuse_idle("retrieval", self, "id_column", "text_column", idle=not self.corpus, why="without corpus")
        refuse_idle("retrieval", self, "seed", idle=bool(self.corpus), why="with a corpus")
        documents = self._documents()
        for number, (name, _) in enumerate(documents):
            self._numbers.setdefault(name, []).append(number)
        texts = [text for _, text in documents]
        if self.index == Index.bm25:
            self._search = LexicalMatcher(texts).best
        else:
            model = sentence_encoder(self.model, "retrieval's setting model") if self.model else None
            self._search = _dense(texts, model or fit_embedding(texts).embed)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return the metric for each; None for rows without the fact ``relevant``."""
        return [self._value(rollout.row, rollout.text) for rollout in rollouts]

    def _documents(self) -> list[tuple[str, str]]:
        if self.corpus:
            setting = "retrieval's setting corpus"
            cells = read_documents(self.corpus, [self.id_column, self.text_column], setting)
            return [(name, text) for name, text in cells]
        world = draw_world(self.seed)
        ads = [shown_ad(ad, world) for ad in world.ads]
        return [(ad.title, " ".join((ad.title, ad.seller, ad.description))) for ad in ads]

    def _value(self, row: ChatRow, text: str) -> float | None:
        names = _ids(row.facts.get(self.relevant))
        if not names:
            return None
        relevant = {number for name in names for number in self._numbers.get(name, ())}
        if not relevant:
            raise DataError(
                f"row {row.id!r}: none of its relevant documents, {', '.join(names):.80}, is in the corpus."
            )
        queries = _queries(row, text)
        return fmean(self._found(query, relevant) for query in queries) if queries else 0.0

    def _found(self, query: str, relevant: set[int]) -> float:
        ranks = [rank for rank, number in enumerate(self._search(query, self.k), 1) if number in relevant]
        if self.metric == RetrievalMetric.recall:
            return len(ranks) / len(relevant)
        return _gain(ranks) / _gain(range(1, min(self.k, len(relevant)) + 1))


def _gain(ranks: Sequence[int]) -> float:
    return math.fsum(1 / math.log2(1 + rank) for rank in ranks)


def _ids(value: JsonValue) -> list[str]:
    if isinstance(value, dict):
        value = value.get("title")
    if isinstance(value, list | tuple):
        return [str(each) for each in value]
    return [] if value is None else [str(value)]


def _queries(row: ChatRow, text: str) -> Sequence[str]:
    if row.task != query_generation.TASK:
        return [query] if (query := said_text(row, text)) else []
    answer = read_answer(row, text)
    return answer.texts if isinstance(answer, query_generation.Queries) else []


def _dense(texts: Sequence[str], embed: Embed) -> Search:
    documents_ND = embed(texts)

    def search(query: str, k: int) -> list[int]:
        cosines_N = documents_ND @ embed([query])[0]
        best: list[int] = np.argsort(-cosines_N, kind="stable")[:k].tolist()
        return best

    return search
