"""A frozen pipeline of four items with scores and chances set by hand, for the tests of rewards."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_ads.config.downstream import DownstreamConfig
from megatron_ads.downstream.logs import Item
from megatron_ads.downstream.pipeline import ItemCounts, Pipeline
from megatron_ads.downstream.ranker import Ranker
from megatron_ads.downstream.retriever import Retriever, top_k
from megatron_ads.tasks.user_history import UserHistory

ITEMS = ("Acme", "Blue", "Crown", "Dune")
PREFERRED = (4.0, 3.0, 2.0, 1.0)
"""Scores of the items for everybody who asks nothing."""
CLICK, CONVERSION = (0.1, 0.2, 0.3, 0.4), 0.5
"""P(click) of each item, and P(conversion | click)."""


class ByHand(Pipeline):
    """Scores are ``PREFERRED``, and 10 / i more for an item that line i of the query names."""

    def users(self, histories: Sequence[UserHistory], queries: Sequence[str]) -> Tensor:
        assert len(histories) == len(queries)
        scores_NJ = torch.tensor([PREFERRED] * len(queries))
        for row, query in enumerate(queries):
            for place, line in enumerate(filter(None, query.split("\n")), 1):
                if line in ITEMS:
                    scores_NJ[row, ITEMS.index(line)] += 10 / place
        return scores_NJ

    def retrieve(self, user_NC: Tensor, k: int) -> NDArray[np.int64]:
        return top_k(user_NC.numpy(), k)

    def chances(self, user_NC: Tensor, item_N: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float64]:
        assert len(user_NC) == len(item_N)
        click_N = np.array([CLICK[item] for item in item_N])
        return np.stack([click_N, click_N * CONVERSION], axis=1)


def by_hand(_: Path) -> Pipeline:
    """Stand in for ``load_pipeline``."""
    config = DownstreamConfig()
    with torch.device("meta"):
        retriever = Retriever(config.retriever, config.buckets)
        ranker = Ranker(config.ranker, config.retriever.dimensions)
    return ByHand(
        config=config,
        items=[Item(name, "") for name in ITEMS],
        retriever=retriever,
        ranker=ranker,
        counts=ItemCounts(bought=(1,) * 4, shown=(1,) * 4, clicked=(1,) * 4, converted=(1,) * 4),
        ctcvr_range=(0.05, 0.25),
    )
