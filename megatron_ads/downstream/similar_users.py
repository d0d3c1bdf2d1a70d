"""The user of whom a model said the most similar thing, and what that user did lately.

At an anchor t, a user is compared with everybody else, as the model saw each at their latest anchor up to t, by the
cosine of the vectors of answers; faiss searches exactly. The sequence is that user's latest events before t: nothing
that happens later is in it, of whichever user.

Source: Taiji, section 2.4 (top-1 by cosine, the recent 100 events).
"""

from collections.abc import Sequence

import numpy as np

from megatron_ads.data.user_features import LoggedEvent
from megatron_ads.downstream.product_codes import Vectors, faiss_module
from megatron_ads.tasks.user_history import CONVERSIONS


def most_similar(vector_ND: Vectors, users: Sequence[str], anchors: Sequence[float]) -> list[int | None]:
    """Return for each of N answers the number of the one that is most similar; None if there is none.

    Answers with a vector of length 0 are similar to nothing. Of equally similar ones it is the first that faiss finds.

    Raises:
        ConfigError: If faiss is not installed.
    """
    faiss, said_N = faiss_module(), np.linalg.norm(vector_ND, axis=1) > 0
    found: list[int | None] = [None] * len(users)
    latest: dict[str, int] = {}
    for anchor in sorted(set(anchors)):
        asking = [number for number, time in enumerate(anchors) if time == anchor and said_N[number]]
        latest |= {users[number]: number for number in asking}
        known = list(latest.values())
        if len(known) < 2 or not asking:
            continue
        index = faiss.IndexFlatIP(vector_ND.shape[1])
        index.add(np.ascontiguousarray(vector_ND[known]))
        # Two are enough: a user is in the index once, so that one of the two is another.
        _, nearest_N2 = index.search(np.ascontiguousarray(vector_ND[asking]), 2)
        for number, places in zip(asking, nearest_N2, strict=True):
            others = [known[place] for place in places if users[known[place]] != users[number]]
            found[number] = others[0]
    return found


def recent_events(log: Sequence[LoggedEvent], *, before: float, most: int) -> tuple[str, ...]:
    """Return a user's latest events before a time, the newest first, as ``bought=NAME``, ``saw=NAME`` and so on.

    An event without an advertiser is known by its category, else by its text.
    """
    earlier = [event for event in log if event.time < before]
    return tuple(_described(event) for event in reversed(earlier[-most:]))


def _described(event: LoggedEvent) -> str:
    if event.advertiser:
        return f"{'bought' if event.kind in CONVERSIONS else 'saw'}={event.advertiser}"
    return f"wanted={event.category or event.text}"
