"""A channel of candidates beside the main retrieval: the two towers under a filter of predicted advertisers.

    main      the k best of all items
    targeted  the items that a model predicted for the user, the filter, best first
    merged    main's first k - quota; then targeted ones that are not among them, as many as the quota; then main's next
              ones until there are k: each item once

A quota that is filled with what main has already would add nothing: towers with the same objective prefer the same
items, filter or not. How often that happens is reported as repeated.
An item is what an answer names, so that the filter keeps the items of the predicted advertisers.
Source: advertiser paper, sections 3.6.1 and 4.5.1; how channels are merged is ours.

Shape suffixes: N = users, J = items, C = length of the vectors, K = candidates of a user.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_ads.downstream.retriever import top_k

Numbers = NDArray[np.float32]


def targeted(score_NJ: Numbers, predicted: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return each user's predicted items, best first.

    Args:
        score_NJ: Inner products of the towers.
        predicted: Numbers of items for each user, each once.
    """
    found = []
    for scores_J, items in zip(score_NJ, predicted, strict=True):
        best = top_k(scores_J[np.array(items, dtype=np.int64)][None], len(items))[0]
        found.append([items[place] for place in best])
    return found


@dataclass(frozen=True, slots=True)
class Merged:
    """The candidates of one user."""

    all: list[int]
    """At most k, each once."""
    channel: list[int]
    """Those of them that the channel gave."""
    repeated: int
    """Of the channel's first ones, as many as the quota: those that main's first k - quota had."""


def merged(main: Sequence[int], channel: Sequence[int], *, k: int, quota: int) -> Merged:
    """Return candidates of both; ``main`` has at least ``k``, if there are so many items."""
    kept = list(main[: k - quota])
    own = [item for item in channel if item not in kept][:quota]
    everything = list(dict.fromkeys([*kept, *own, *main[k - quota :]]))[:k]
    return Merged(everything, own, repeated=sum(item in kept for item in channel[:quota]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Diversity:
    """What candidates of many users hold together, after each user's were made distinct."""

    repeated_share: float | None
    """Of the channel's first ones, those that main had; None where the channel has no quota."""
    new_share: float | None
    """Of the channel's candidates, those that main's k do not have."""
    different_items: int
    """Among the candidates of all users."""
    effective_items: float
    """exp of the entropy of how often each item is a candidate: as many equally frequent items would be as diverse."""


def diversity(candidates: Sequence[Merged], main_NJ: Sequence[Sequence[int]], *, k: int) -> Diversity:
    """Return the diversity of merged candidates, given what main alone has in order."""
    given, repeated = sum(len(one.channel) for one in candidates), sum(one.repeated for one in candidates)
    pairs = zip(candidates, main_NJ, strict=True)
    new = sum(item not in main[:k] for one, main in pairs for item in one.channel)
    often_J = np.bincount([item for one in candidates for item in one.all])
    share = often_J[often_J > 0] / often_J.sum()
    return Diversity(
        repeated_share=repeated / (given + repeated) if given + repeated else None,
        new_share=new / given if given else None,
        different_items=int((often_J > 0).sum()),
        effective_items=float(np.exp(-(share * np.log(share)).sum())),
    )
