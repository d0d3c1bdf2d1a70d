"""Retriever: a tower for users and their queries, one for items; their inner product ranks all items, exactly.

    u = h + q + MLP_u([h, q]),    v = b + MLP_v(b)       h, q, b: embedded bags of history, query, item
    loss = -log softmax_j(u . v_j - log p_j)[own item]   j: the items of the batch, each once

p_j is the share of item j among the examples. Without it, items of the batch would be taken for drawn evenly, and
popular ones be ranked too low. Examples are conversions, clicks or impressions; the loss of a click counts
log(1 + seconds of the visit) (the advertiser paper, 4.5.1, weighs by duration and does not say how: ours).
Source: sampling-bias-corrected two-tower model, Yi et al., RecSys 2019, eq. 3.

Shape suffixes: N = users, B = examples of a batch, J = items, K = items retrieved, C = length of the vectors.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from torch import Tensor, nn

from megatron_ads.config.downstream import RetrieverObjective, TowersConfig
from megatron_ads.downstream.examples import Examples
from megatron_ads.downstream.logs import Item
from megatron_ads.downstream.words import Bags, Words, take
from megatron_ads.errors import DataError
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


@dataclass(frozen=True, slots=True)
class Positives:
    """E items that were good for somebody."""

    history_E: NDArray[np.int64]
    """Number of the history that each is predicted from."""
    item_E: NDArray[np.int64]
    queries: Sequence[str]
    """What was searched for before; empty if nothing."""
    weight_E: NDArray[np.float32]


def positives_of(examples: Examples, objective: RetrieverObjective) -> Positives:
    """Return what a retriever with an objective learns from.

    Raises:
        DataError: If there is none, or no click says how long the visit lasted.
    """
    weights: list[float | None]
    if objective is RetrieverObjective.conversions:
        found = [(each.history, each.item, each.query) for each in examples.purchases]
        weights = [1.0] * len(found)
    else:
        wanted = [one for one in examples.impressions if objective is RetrieverObjective.impressions or one[1].clicked]
        found = [(number, shown.item, shown.query) for number, shown in wanted]
        weights = [
            1.0 if objective is RetrieverObjective.impressions else _weight(shown.seconds) for _, shown in wanted
        ]
    known = [weight for weight in weights if weight is not None]
    if sum(known) <= 0:
        raise DataError(
            f"retriever.objective is {objective}, and of {len(found)} such examples none counts. Clicks need the "
            "column seconds in the table impressions, how long each visit lasted; or choose another objective."
        )
    mean = sum(known) / len(known)  # of a click whose visit is not known
    return Positives(
        history_E=np.array([history for history, _, _ in found]),
        item_E=np.array([item for _, item, _ in found]),
        queries=[query for _, _, query in found],
        weight_E=np.array([mean if weight is None else weight for weight in weights], dtype=np.float32),
    )


def _weight(seconds: float | None) -> float | None:
    return None if seconds is None else math.log1p(seconds)


def train_retriever(
    examples: Examples, items: Sequence[Item], words: Words, config: TowersConfig, *, seed: int
) -> Retriever:
    """Return a retriever trained for the objective of ``config``; bit-equal for the same arguments on a CPU.

    Raises:
        DataError: As ``positives_of``.
    """
    torch.manual_seed(seed)
    model = Retriever(config, words.buckets)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    positives = positives_of(examples, config.objective)
    weight_J = np.bincount(positives.item_E, weights=positives.weight_E, minlength=len(items))
    log_share_J = torch.from_numpy(np.log(weight_J / positives.weight_E.sum() + 1e-12)).float()
    item_bags = words.items(items)
    steps = config.epochs * -(-len(positives.item_E) // config.batch_size)
    with Progress(steps, description="training the retriever") as progress:
        for history_B, query_B, batch in _batches(examples, positives, items, words, config, seed=seed):
            distinct_J, own_B = np.unique(positives.item_E[batch], return_inverse=True)
            scores_BJ = model.users(history_B, query_B) @ model.items(take(item_bags, distinct_J)).T
            each_B = nn.functional.cross_entropy(
                scores_BJ - log_share_J[distinct_J], torch.from_numpy(own_B), reduction="none"
            )
            weight_B = torch.from_numpy(positives.weight_E[batch])
            loss = (each_B * weight_B).sum() / weight_B.sum().clamp(min=1e-6)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            progress.update(loss=loss.item())
    return model.eval().requires_grad_(False)


def _batches(
    examples: Examples, positives: Positives, items: Sequence[Item], words: Words, config: TowersConfig, *, seed: int
) -> Iterator[tuple[csr_matrix, csr_matrix, NDArray[np.int64]]]:
    """Yield bags of histories and of queries, and the numbers of the examples; in an epoch each comes once."""
    count, draw = len(positives.item_E), np.random.default_rng([seed, 1])
    histories = words.histories(examples.histories)
    queries = words.queries(positives.queries)
    names = words.queries(item.name for item in items)
    for _ in range(config.epochs):
        order, how = draw.permutation(count), draw.random(count)
        for start in range(0, len(order), config.batch_size):
            batch = order[start : start + config.batch_size]
            named = how[batch] < config.name_share
            searched = ~named & (how[batch] < config.name_share + (1 - config.name_share) * config.query_share)
            query = take(queries, batch, searched) + take(names, positives.item_E[batch], named)
            yield take(histories, positives.history_E[batch]), query, batch
