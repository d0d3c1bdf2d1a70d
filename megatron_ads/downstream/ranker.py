"""Ranker: how likely a user clicks on an item, and converts after the click, by a deep and cross network.

    x_0     = [u, v, u * v, u . v / sqrt(C), f_1, ...]  u, v: vectors of user, with or without query, and item
                                                        f: further fields of the pair, embedded bags; usually none
    x_{l+1} = x_0 * (W_l x_l + c_l) + x_l             cross layers
    logits  = w . [x_L, MLP(x_0)]                     of a click, and of a conversion given a click
    CTCVR   = P(click) P(conversion | click)

    loss = BCE(click) over impressions + BCE(conversion | click) over clicked ones, each a mean

Source: DCN-v2, arXiv:2008.13535, eq. 1 and the parallel structure of figure 1. Vectors are the retriever's (ours: with
embeddings of its own the ranker orders held-out impressions worse).

Shape suffixes: N = pairs of user and item, C = length of the retriever's vectors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from torch import Tensor, nn

from megatron_ads.config.downstream import CrossConfig
from megatron_ads.downstream.examples import Examples
from megatron_ads.downstream.retriever import Retriever
from megatron_ads.downstream.words import Bags, Words, take
from megatron_ads.progress import Progress

FIELD_DIMENSIONS = 16
"""Length of the vector of a further field."""


@dataclass(frozen=True, slots=True)
class Field:
    """A categorical feature of N pairs: a bag of words each, of which several may have the same."""

    bags: csr_matrix
    row_N: NDArray[np.int64]
    """Row of ``bags`` that each pair has."""

    def of(self, chosen: NDArray[np.int64]) -> csr_matrix:
        """Return the bags of some pairs."""
        return take(self.bags, self.row_N[chosen])


@dataclass(frozen=True, slots=True)
class Shown:
    """N impressions as a ranker learns from them: what is made of texts, once."""

    histories: csr_matrix
    queries: csr_matrix
    """Of each impression."""
    history_N: NDArray[np.int64]
    """Row of ``histories`` that each impression has."""
    item_N: NDArray[np.int64]
    happened_N2: Tensor
    """Whether it was clicked on, and whether a conversion followed the click."""

    @classmethod
    def of(cls, examples: Examples, words: Words) -> "Shown":
        """Return the impressions of some examples."""
        shown = [each for _, each in examples.impressions]
        return cls(
            histories=words.histories(examples.histories),
            queries=words.queries(each.query for each in shown),
            history_N=np.array([number for number, _ in examples.impressions], dtype=np.int64),
            item_N=np.array([each.item for each in shown], dtype=np.int64),
            happened_N2=torch.tensor([(each.clicked, each.clicked and each.converted) for each in shown]).float(),
        )

    def users(self, retriever: Retriever, chosen: NDArray[np.int64], searched: NDArray[np.bool_]) -> Tensor:
        """Return the vectors of the users of some impressions, with the query where it is ``searched`` for."""
        query = take(self.queries, chosen, searched)
        return retriever.users(take(self.histories, self.history_N[chosen]), query)


class Ranker(nn.Module):
    """The network."""

    def __init__(self, config: CrossConfig, dimensions: int, *, buckets: Sequence[int] = ()) -> None:
        """Take ``dimensions``, the length C of the retriever's vectors, and the buckets of each further field."""
        super().__init__()
        inputs, hidden = 3 * dimensions + 1 + FIELD_DIMENSIONS * len(buckets), config.hidden
        self.cross = nn.ModuleList(nn.Linear(inputs, inputs) for _ in range(config.cross_layers))
        self.deep = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.heads = nn.Linear(inputs + hidden, 2)
        self.fields = nn.ModuleList(Bags(count, FIELD_DIMENSIONS) for count in buckets)

    def forward(self, user_NC: Tensor, item_NC: Tensor, bags: Sequence[csr_matrix] = ()) -> Tensor:
        """Return (N, 2): the logits of a click, and of a conversion given a click."""
        product_NC = user_NC * item_NC
        score_N1 = product_NC.sum(dim=1, keepdim=True) / product_NC.shape[1] ** 0.5
        further = [embed(of_pairs) for embed, of_pairs in zip(self.fields, bags, strict=True)]
        first = torch.cat([user_NC, item_NC, product_NC, score_N1, *further], dim=1)
        crossed = first
        for layer in self.cross:
            crossed = first * layer(crossed) + crossed
        logits: Tensor = self.heads(torch.cat([crossed, self.deep(first)], dim=1))
        return logits

    def chances(self, user_NC: Tensor, item_NC: Tensor, bags: Sequence[csr_matrix] = ()) -> Tensor:
        """Return (N, 2): P(click), and CTCVR = P(click and conversion)."""
        click_N, conversion_N = torch.sigmoid(self(user_NC, item_NC, bags)).unbind(dim=1)
        return torch.stack([click_N, click_N * conversion_N], dim=1)


def train_ranker(
    shown: Shown, item_JC: Tensor, retriever: Retriever, config: CrossConfig, *, seed: int, fields: Sequence[Field] = ()
) -> Ranker:
    """Return a ranker trained on impressions; bit-equal for the same arguments on one CPU thread.

    Args:
        shown: The impressions.
        item_JC: Vectors of all items.
        retriever: Whose vectors of users are taken; it is not trained.
        config: Settings.
        seed: Of first weights and order.
        fields: Further features of the impressions, in their order.
    """
    torch.manual_seed(seed)
    model = Ranker(config, item_JC.shape[1], buckets=[field.bags.shape[1] for field in fields])
    draw = np.random.default_rng([seed, 2])
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    count = len(shown.item_N)
    steps = config.epochs * -(-count // config.batch_size)
    with Progress(steps, description="training the ranker") as progress:
        for _ in range(config.epochs):
            searched = draw.random(count) < config.query_share
            for batch in np.array_split(draw.permutation(count), steps // config.epochs):
                user_NC = shown.users(retriever, batch, searched[batch])
                logits_N2 = model(user_NC, item_JC[shown.item_N[batch]], [field.of(batch) for field in fields])
                loss = _loss(logits_N2, shown.happened_N2[batch])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                progress.update(loss=loss.item())
    return model.eval().requires_grad_(False)


def _loss(logits_N2: Tensor, happened_N2: Tensor) -> Tensor:
    each_N2 = nn.functional.binary_cross_entropy_with_logits(logits_N2, happened_N2, reduction="none")
    clicked_N = happened_N2[:, 0]
    return each_N2[:, 0].mean() + (each_N2[:, 1] * clicked_N).sum() / clicked_N.sum().clamp(min=1)
