"""A frozen pipeline: both models, the items they know, and how scores are normalised. Trained once, loaded by path.

Shape suffixes: N = users, J = items, C = length of the vectors.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_ads.config.downstream import DownstreamConfig
from megatron_ads.downstream.examples import Examples, training_examples
from megatron_ads.downstream.logs import Item, Logs, item_numbers
from megatron_ads.downstream.ranker import Ranker, Shown, train_ranker
from megatron_ads.downstream.retriever import Retriever, top_k, train_retriever
from megatron_ads.downstream.words import Words
from megatron_ads.metrics.ranking import same_name
from megatron_ads.tasks.user_history import UserHistory

_TABLE_USERS = 512
"""Users of the table that CTCVR is normalised over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemCounts:
    """How often each of J items was bought, shown, clicked and converted in training: what is popular."""

    bought: tuple[int, ...]
    shown: tuple[int, ...]
    clicked: tuple[int, ...]
    converted: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Retrieval of the k best items for a user, with or without a query; chances of click and conversion of a pair."""

    config: DownstreamConfig
    items: list[Item]
    retriever: Retriever
    ranker: Ranker
    counts: ItemCounts
    ctcvr_range: tuple[float, float]
    """Lowest and highest CTCVR in a table of users times items."""
    digest: str = ""
    """Of the content, once it is in a folder."""

    @cached_property
    def words(self) -> Words:
        """What makes bags of texts."""
        return Words(self.config.buckets, self.config.half_life_days)

    @cached_property
    def item_JC(self) -> Tensor:
        """Vectors of all items."""
        return self.retriever.items(self.words.items(self.items))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return item_numbers(self.items)

    def number_of(self, name: str) -> int | None:
        """Return the number of the item that an answer names; None if there is none."""
        return self._numbers.get(same_name(name))

    def users(self, histories: Sequence[UserHistory], queries: Sequence[str]) -> Tensor:
        """Return the vectors of N users, (N, C); an empty query is none."""
        return self.retriever.users(self.words.histories(histories), self.words.queries(queries))

    def retrieve(self, user_NC: Tensor, k: int) -> NDArray[np.int64]:
        """Return the k best items of each user, best first: (N, min(k, J)), by an exact search."""
        return top_k((user_NC @ self.item_JC.T).numpy(), k)

    def chances(self, user_NC: Tensor, item_N: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float64]:
        """Return (N, 2): P(click) and P(click and conversion) of one item for each user."""
        chosen_NC = self.item_JC[torch.as_tensor(item_N, dtype=torch.long)]  # of an empty list too
        return self.ranker.chances(user_NC, chosen_NC).numpy().astype(np.float64)

    def normalized_ctcvr(self, ctcvr: float) -> float:
        """Return it as a share of the range in the table, from 0 to 1."""
        low, high = self.ctcvr_range
        return min(max((ctcvr - low) / (high - low), 0.0), 1.0) if high > low else 0.0


def train_pipeline(logs: Logs, config: DownstreamConfig) -> Pipeline:
    """Return a pipeline trained on the users that are not held out; the same weights, bit by bit, for the same logs.

    Raises:
        DataError: If the logs hold too little.
    """
    examples, words = training_examples(logs, config), Words(config.buckets, config.half_life_days)
    items = list(logs.items)
    with one_thread():
        retriever = train_retriever(examples, items, words, config.retriever, seed=config.seed)
        item_JC = retriever.items(words.items(items))
        ranker = train_ranker(Shown.of(examples, words), item_JC, retriever, config.ranker, seed=config.seed)
        table = _score_table(examples, words, retriever, ranker, item_JC)
    return Pipeline(
        config=config,
        items=items,
        retriever=retriever,
        ranker=ranker,
        counts=_counts(examples, len(items)),
        ctcvr_range=(float(table.min()), float(table.max())),
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: sums then have one order, whatever the machine, and such small models are faster so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _score_table(examples: Examples, words: Words, retriever: Retriever, ranker: Ranker, item_JC: Tensor) -> Tensor:
    """Return CTCVR of all items for the latest histories, without a query: (users, J)."""
    histories = examples.histories[:_TABLE_USERS]  # the first anchor is the latest
    user_NC = retriever.users(words.histories(histories), words.queries([""] * len(histories)))
    return torch.stack([ranker.chances(user.expand_as(item_JC), item_JC)[:, 1] for user in user_NC])


def _counts(examples: Examples, items: int) -> ItemCounts:
    shown = [each for _, each in examples.impressions]
    clicked = [each for each in shown if each.clicked]
    of_each = {
        "bought": [purchase.item for purchase in examples.purchases],
        "shown": [each.item for each in shown],
        "clicked": [each.item for each in clicked],
        "converted": [each.item for each in clicked if each.converted],
    }
    return ItemCounts(**{name: tuple(np.bincount(found, minlength=items).tolist()) for name, found in of_each.items()})
