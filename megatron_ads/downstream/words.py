"""Users, queries and items as bags of weighted words, hashed to numbers: what both models read.

    history   "kind=advertiser", "category=...", "brand=..." and the words of searches and pages, each with the weight
              2^(-days ago / half life), summed; age, gender and state with weight 1
    query     its words, and each line as a whole; line i counts 1 / log2(1 + i), so that order matters in a ranking
    item      its name as a whole, and the words of name and text

Each bag is scaled to length 1. Lines as a whole, folded, are what a name in a query and an item's name have in common.
Source: the hashing trick, arXiv:0902.2206, by scikit-learn's ``FeatureHasher`` without signs.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from sklearn.feature_extraction import FeatureHasher
from sklearn.preprocessing import normalize
from torch import Tensor

from megatron_ads.downstream.logs import Item
from megatron_ads.errors import DataError
from megatron_ads.metrics.ranking import same_name
from megatron_ads.metrics.text import words_of
from megatron_ads.rows import ChatRow, Fact
from megatron_ads.tasks.user_history import CONVERSIONS, Demographics, Event, EventKind, Section, UserHistory

Word = tuple[str, float]
_OF_TEXT = frozenset({EventKind.onsite_search, EventKind.offsite_search, EventKind.click, EventKind.page_view})
"""Kinds of events whose text is in words; conversions and URLs are known by advertiser and category."""


class Words:
    """Makes bags, one row each of a sparse matrix (N, buckets)."""

    def __init__(self, buckets: int, half_life_days: float) -> None:
        self._hasher = FeatureHasher(n_features=buckets, input_type="pair", alternate_sign=False, dtype=np.float32)
        self.buckets = buckets
        self._half_life_days = half_life_days

    def histories(self, histories: Iterable[UserHistory]) -> csr_matrix:
        """Return the bags of what users did."""
        return self._bags(_of_history(history, self._half_life_days) for history in histories)

    def queries(self, queries: Iterable[str]) -> csr_matrix:
        """Return the bags of texts; an empty text has an empty one."""
        return self._bags(map(_of_query, queries))

    def items(self, items: Iterable[Item]) -> csr_matrix:
        """Return the bags of items."""
        return self._bags(_of_item(item) for item in items)

    def _bags(self, bags: Iterable[Iterator[Word]]) -> csr_matrix:
        hashed: csr_matrix = normalize(self._hasher.transform(list(map(list, bags))))
        return hashed


def _of_history(history: UserHistory, half_life_days: float) -> Iterator[Word]:
    about = history.demographics
    states = [("state", word) for word in words_of(about.state)]
    for name, value in (("age", about.age), ("gender", about.gender), *states):
        if value:
            yield f"{name}={value}", 1.0
    for event in history.events:
        weight = 2.0 ** (-event.days_ago / half_life_days)
        did = "bought" if event.kind in CONVERSIONS else "saw"
        for name, value in ((did, event.advertiser), ("category", event.category), ("brand", event.brand)):
            if value:
                yield f"{name}={same_name(value)}", weight
        if event.kind in _OF_TEXT:
            yield from ((word, weight) for word in words_of(event.text))


def _of_query(query: str) -> Iterator[Word]:
    for place, line in enumerate((line for line in query.split("\n") if line.strip()), 1):
        weight = 1 / math.log2(1 + place)
        yield f"={same_name(line)}", weight
        yield from ((word, weight) for word in words_of(line))


def _of_item(item: Item) -> Iterator[Word]:
    yield f"={same_name(item.name)}", 3.0  # as much as the words of a long text: it tells items apart
    yield from ((word, 1.0) for word in words_of(f"{item.name} {item.text}"))


def history_of(row: ChatRow) -> UserHistory:
    """Return what a row's facts say of its user: all events, or of a row without them what its prompt shows.

    Raises:
        DataError: If an event has no kind, text or age in days, or a value is of another type.
    """
    about, events = row.facts.get(Fact.demographics), row.facts.get(Fact.events)
    known = {name: str(about[name]) for name in _ABOUT if name in about} if isinstance(about, Mapping) else {}
    if isinstance(events, list):
        made = tuple(_event(fact, row.id) for fact in events)
    else:
        shown = row.facts.get(Fact.history)
        made = tuple(_shown_events(shown, row.id)) if isinstance(shown, Mapping) else ()
    return UserHistory(user_id=row.group, events=made, demographics=Demographics(**known))


_ABOUT = tuple(field.name for field in fields(Demographics))
_TEXTS = ("category", "brand", "advertiser")


def _event(fact: Any, row_id: str) -> Event:
    try:
        texts = {name: str(fact[name]) for name in _TEXTS if name in fact}
        return Event(kind=EventKind(fact["kind"]), days_ago=float(fact["days_ago"]), text=str(fact["text"]), **texts)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"row {row_id!r}: {fact!r:.80} is no event ({error}). It needs kind, text and days_ago."
        ) from None


def _shown_events(shown: Mapping[str, Any], row_id: str) -> Iterator[Event]:
    """Yield events that say what the sections of a prompt do; how old they are is not known."""

    def texts(section: Section) -> Sequence[str]:
        values: Sequence[str] = shown.get(section, ())
        if not isinstance(values, list | tuple) or not all(isinstance(value, str) for value in values):
            raise DataError(f"row {row_id!r}: its history has {section} = {values!r:.80}; it must be a list of texts.")
        return values

    for advertiser in texts(Section.past_advertisers):
        yield Event(kind=EventKind.matched_conversion, days_ago=0.0, text="", advertiser=advertiser)
    for category in texts(Section.top_categories):
        yield Event(kind=EventKind.offsite_url, days_ago=0.0, text="", category=category)
    for brand in texts(Section.top_brands):
        yield Event(kind=EventKind.offsite_url, days_ago=0.0, text="", brand=brand)
    for section, kind in _SEARCHED.items():
        for text in texts(section):
            yield Event(kind=kind, days_ago=0.0, text=text)


_SEARCHED = {
    Section.onsite_searches: EventKind.onsite_search,
    Section.offsite_searches: EventKind.offsite_search,
    Section.clicks: EventKind.click,
}


class Bags(torch.nn.Module):
    """Embeds bags: the weighted sum of the vectors of their words."""

    def __init__(self, buckets: int, dimensions: int) -> None:
        super().__init__()
        self._vectors = torch.nn.EmbeddingBag(buckets, dimensions, mode="sum")
        torch.nn.init.normal_(self._vectors.weight, std=dimensions**-0.5)

    def forward(self, bags: csr_matrix) -> Tensor:
        """Return (N, dimensions) for N bags."""
        words, starts, weights = (
            torch.from_numpy(np.asarray(part, dtype=kind))
            for part, kind in ((bags.indices, np.int64), (bags.indptr[:-1], np.int64), (bags.data, np.float32))
        )
        embedded: Tensor = self._vectors(words, starts, per_sample_weights=weights)
        return embedded


def take(bags: csr_matrix, rows: Sequence[int] | np.ndarray, keep: np.ndarray | None = None) -> csr_matrix:
    """Return some rows of a matrix of bags; those for which ``keep`` is false are empty."""
    chosen: csr_matrix = bags[rows]
    if keep is not None:
        chosen = chosen.multiply(keep[:, None].astype(np.float32)).tocsr()
    return chosen
