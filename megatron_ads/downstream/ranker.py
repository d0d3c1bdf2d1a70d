"""Ranker: how likely a user clicks on an item, and converts after the click, by a deep and cross network.

    x_0     = [h, q, b, h * b, q * b]                 h, q, b: embedded bags of history, query, item
    x_{l+1} = x_0 * (W_l x_l + c_l) + x_l             cross layers
    logits  = w . [x_L, MLP(x_0)]                     of a click, and of a conversion given a click
    CTCVR   = P(click) P(conversion | click)

    loss = BCE(click) over impressions + BCE(conversion | click) over clicked ones, each a mean

Source: DCN-v2, arXiv:2008.13535, eq. 1 and the parallel structure of figure 1; the products in x_0 are ours.

Shape suffixes: N = pairs of user and item, C = length of x_0.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from torch import Tensor, nn

from megatron_ads.config.downstream import CrossConfig
from megatron_ads.downstream.examples import Examples
from megatron_ads.downstream.logs import Item
from megatron_ads.downstream.words import Bags, Words, take
from megatron_ads.progress import Progress


class Ranker(nn.Module):
    """The network."""

    def __init__(self, config: CrossConfig, buckets: int) -> None:
        super().__init__()
        inputs = 5 * config.dimensions
        self.history = Bags(buckets, config.dimensions)
        self.words = Bags(buckets, config.dimensions)
        """Of queries and items."""
        self.cross = nn.ModuleList(nn.Linear(inputs, inputs) for _ in range(config.cross_layers))
        self.deep = nn.Sequential(
            nn.Linear(inputs, config.hidden), nn.ReLU(), nn.Linear(config.hidden, config.hidden), nn.ReLU()
        )
        self.heads = nn.Linear(inputs + config.hidden, 2)

    def forward(self, history_N: csr_matrix, query_N: csr_matrix, item_N: csr_matrix) -> Tensor:
        """Return (N, 2): the logits of click, and of conversion given a click."""
        known, asked, shown = self.history(history_N), self.words(query_N), self.words(item_N)
        first_NC = torch.cat([known, asked, shown, known * shown, asked * shown], dim=1)
        crossed_NC = first_NC
        for layer in self.cross:
            crossed_NC = first_NC * layer(crossed_NC) + crossed_NC
        logits: Tensor = self.heads(torch.cat([crossed_NC, self.deep(first_NC)], dim=1))
        return logits


def train_ranker(examples: Examples, items: Sequence[Item], words: Words, config: CrossConfig, *, seed: int) -> Ranker:
    """Return a ranker trained on impressions; bit-equal for the same arguments on a CPU."""
    torch.manual_seed(seed)
    model = Ranker(config, words.buckets)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    steps = config.epochs * -(-len(examples.impressions) // config.batch_size)
    with Progress(steps, description="training the ranker") as progress:
        for bags, happened_N2 in _batches(examples, items, words, config, seed=seed):
            loss = _loss(model(*bags), torch.from_numpy(happened_N2).float())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            progress.update(loss=float(loss))
    return model.eval().requires_grad_(False)


def _loss(logits_N2: Tensor, happened_N2: Tensor) -> Tensor:
    each_N2 = nn.functional.binary_cross_entropy_with_logits(logits_N2, happened_N2, reduction="none")
    clicked_N = happened_N2[:, 0]
    return each_N2[:, 0].mean() + (each_N2[:, 1] * clicked_N).sum() / clicked_N.sum().clamp(min=1)


def _batches(
    examples: Examples, items: Sequence[Item], words: Words, config: CrossConfig, *, seed: int
) -> Iterator[tuple[tuple[csr_matrix, csr_matrix, csr_matrix], NDArray[np.bool_]]]:
    """Yield bags of histories, queries and items, and (N, 2) whether they were clicked and converted."""
    draw, shown = np.random.default_rng([seed, 2]), [each for _, each in examples.impressions]
    histories, item_bags = words.histories(examples.histories), words.items(items)
    queries = words.queries(each.query for each in shown)
    history_E, item_E = np.array([number for number, _ in examples.impressions]), np.array([each.item for each in shown])
    happened_E2 = np.array([(each.clicked, each.clicked and each.converted) for each in shown])
    for _ in range(config.epochs):
        order, searched = draw.permutation(len(shown)), draw.random(len(shown)) < config.query_share
        for start in range(0, len(order), config.batch_size):
            batch = order[start : start + config.batch_size]
            query = take(queries, batch, searched[batch])
            yield (take(histories, history_E[batch]), query, take(item_bags, item_E[batch])), happened_E2[batch]
