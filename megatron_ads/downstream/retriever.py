"""Retriever: a tower for users and their queries, one for items; their inner product ranks all items, exactly.

    u = h + q + MLP_u([h, q]),    v = b + MLP_v(b)       h, q, b: embedded bags of history, query, item
    loss = -log softmax_j(u . v_j - log p_j)[own item]   j: the items of the batch, each once

p_j is the share of item j among the conversions. Without it, items of the batch would be taken for drawn evenly, and
popular ones be ranked too low.
Source: sampling-bias-corrected two-tower model, Yi et al., RecSys 2019, eq. 3.

Shape suffixes: N = users, B = examples of a batch, J = items, K = items retrieved, C = length of the vectors.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from torch import Tensor, nn

from megatron_ads.config.downstream import TowersConfig
from megatron_ads.downstream.examples import Examples
from megatron_ads.downstream.logs import Item
from megatron_ads.downstream.words import Bags, Words, take
from megatron_ads.progress import Progress


class Retriever(nn.Module):
    """Both towers."""

    def __init__(self, config: TowersConfig, buckets: int) -> None:
        super().__init__()
        size = config.dimensions
        self.history = Bags(buckets, size)
        self.words = Bags(buckets, size)
        """Of queries and items."""
        self.user_layers = _layers(2 * size, config.hidden, size)
        self.item_layers = _layers(size, config.hidden, size)

    def users(self, history_N: csr_matrix, query_N: csr_matrix) -> Tensor:
        """Return (N, C)."""
        known, asked = self.history(history_N), self.words(query_N)
        vectors: Tensor = known + asked + self.user_layers(torch.cat([known, asked], dim=1))
        return vectors

    def items(self, item_J: csr_matrix) -> Tensor:
        """Return (J, C)."""
        described = self.words(item_J)
        vectors: Tensor = described + self.item_layers(described)
        return vectors


def _layers(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def top_k(scores_NJ: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return (N, min(k, J)): the items of the highest scores, best first; of equal ones the first."""
    best: NDArray[np.int64] = np.argsort(-scores_NJ, axis=1, kind="stable")[:, :k]
    return best


def train_retriever(
    examples: Examples, items: Sequence[Item], words: Words, config: TowersConfig, *, seed: int
) -> Retriever:
    """Return a retriever trained on purchases; bit-equal for the same arguments on a CPU."""
    torch.manual_seed(seed)
    model = Retriever(config, words.buckets)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    item_E = np.array([purchase.item for purchase in examples.purchases])
    log_share_J = torch.from_numpy(np.log(np.bincount(item_E, minlength=len(items)) / len(item_E) + 1e-12)).float()
    item_bags = words.items(items)
    steps = config.epochs * -(-len(item_E) // config.batch_size)
    with Progress(steps, description="training the retriever") as progress:
        for history_B, query_B, chosen_B in _batches(examples, items, words, config, seed=seed):
            distinct_J, own_B = np.unique(chosen_B, return_inverse=True)
            scores_BJ = model.users(history_B, query_B) @ model.items(take(item_bags, distinct_J)).T
            loss = nn.functional.cross_entropy(scores_BJ - log_share_J[distinct_J], torch.from_numpy(own_B))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            progress.update(loss=loss.item())
    return model.eval().requires_grad_(False)


def _batches(
    examples: Examples, items: Sequence[Item], words: Words, config: TowersConfig, *, seed: int
) -> Iterator[tuple[csr_matrix, csr_matrix, NDArray[np.int64]]]:
    """Yield bags of histories and of queries, and the items bought; in an epoch each purchase once."""
    purchases, draw = examples.purchases, np.random.default_rng([seed, 1])
    histories = words.histories(examples.histories)
    queries = words.queries(purchase.query for purchase in purchases)
    names = words.queries(item.name for item in items)
    history_E, item_E = (np.array([getattr(each, name) for each in purchases]) for name in ("history", "item"))
    for _ in range(config.epochs):
        order, how = draw.permutation(len(purchases)), draw.random(len(purchases))
        for start in range(0, len(order), config.batch_size):
            batch = order[start : start + config.batch_size]
            named = how[batch] < config.name_share
            searched = ~named & (how[batch] < config.name_share + (1 - config.name_share) * config.query_share)
            query = take(queries, batch, searched) + take(names, item_E[batch], named)
            yield take(histories, history_E[batch]), query, item_E[batch]
