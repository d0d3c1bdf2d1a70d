"""A channel of candidates beside the main retrieval: the two towers under a filter of predicted advertisers.

    main      the k best of all items
    targeted  the best of the items that a model predicted for the user, the filter; at most as many as the quota
    merged    main without its last ones, as many as the quota, then the targeted ones, then main's next ones until
              there are k; each item once, so that a targeted one that main has makes room for main's next

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


def targeted(score_NJ: Numbers, predicted: Sequence[Sequence[int]], quota: int) -> list[list[int]]:
    """Return each user's ``quota`` best of the items predicted for them, best first; fewer where fewer are predicted.

    Args:
        score_NJ: Inner products of the towers.
        predicted: Numbers of items for each user, each once.
        quota: At most so many.
    """
    found = []
    for scores_J, items in zip(score_NJ, predicted, strict=True):
        best = top_k(scores_J[np.array(items, dtype=np.int64)][None], quota)[0]
        found.append([items[place] for place in best])
    return found


def merged(main: Sequence[int], channel: Sequence[int], *, k: int, quota: int) -> list[int]:
    """Return ``k`` candidates, each once, of which as many as ``quota`` are the channel's; fewer if there are no more.

    ``main`` has at least ``k``, if there are so many items.
    """
    kept = list(main[: k - quota])
    return list(dict.fromkeys([*kept, *channel[:quota], *main[k - quota :]]))[:k]


@dataclass(frozen=True, kw_only=True, slots=True)
class Diversity:
    """What candidates of many users hold together, after each user's were made distinct."""

    new_share: float
    """Of the channel's candidates, those that main's k do not have."""
    different_items: int
    """Among the candidates of all users."""
    effective_items: float
    """exp of the entropy of how often each item is a candidate: as many equally frequent items would be as diverse."""


def diversity(
    merged_NK: Sequence[Sequence[int]],
    main_NK: Sequence[Sequence[int]],
    channel: Sequence[Sequence[int]],
    *,
    items: int,
) -> Diversity:
    """Return the diversity of merged candidates.

    Args:
        merged_NK: What ``merged`` returned for each user.
        main_NK: The main retrieval's k.
        channel: The channel's candidates.
        items: How many there are.
    """
    counted = [(set(main), own) for main, own in zip(main_NK, channel, strict=True)]
    given, new = sum(len(own) for _, own in counted), sum(item not in main for main, own in counted for item in own)
    often_J = np.bincount([item for of_user in merged_NK for item in of_user], minlength=items)
    share = often_J[often_J > 0] / often_J.sum()
    return Diversity(
        new_share=new / given if given else 0.0,
        different_items=int((often_J > 0).sum()),
        effective_items=float(np.exp(-(share * np.log(share)).sum())),
    )
