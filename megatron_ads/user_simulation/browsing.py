"""Visits: a user is shown page after page of one recommender's ads, looks, clicks, and leaves or turns the page.

Source: Agent4Rec (arXiv:2310.10108), page-by-page simulation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_ads.data.simulator.world import World
from megatron_ads.progress import Progress
from megatron_ads.stable_random import stable_integer
from megatron_ads.user_simulation.recommenders import Ranking

SATISFACTIONS = (1, 2, 3, 4, 5)


@dataclass(frozen=True, kw_only=True, slots=True)
class PageAnswer:
    """What a user does on one page; ads are counted from 0."""

    looked: tuple[int, ...] = ()
    clicked: tuple[int, ...] = ()
    """Among those looked at."""
    leaves: bool
    satisfaction: int | None = None
    """One of ``SATISFACTIONS`` with the visit so far; None: it was not said."""
    unreadable: str | None = None
    """Why what a model said could not be read: the visit then ends."""


@dataclass(slots=True)
class Visit:
    """One user with one recommender."""

    recommender: str
    user: int
    """Row of the user."""
    shown: list[tuple[int, ...]] = field(default_factory=list)
    """Numbers of the ads of each page."""
    answers: list[PageAnswer] = field(default_factory=list)
    """To each page."""

    def until(self, page: int) -> "Visit":
        """Return the visit as it was when a page, from 0, was shown."""
        return Visit(self.recommender, self.user, self.shown[: page + 1], self.answers[:page])


class BrowsingUsers(Protocol):
    """Who plays the users."""

    def respond(self, visits: Sequence[Visit]) -> list[PageAnswer]:
        """Return what each user does on the last page of ``shown``; the pages before have their answers."""


class AdServer:
    """Chooses the ad of an advertiser: evenly for each pair of user and advertiser, whoever recommends."""

    def __init__(self, world: World, seed: int) -> None:
        self._seed = seed
        self._ads: list[list[int]] = [[] for _ in world.advertisers]
        for number, ad in enumerate(world.ads):
            self._ads[ad.advertiser].append(number)

    def ad(self, user: str, advertiser: int) -> int:
        """Return the number of the ad that a user is shown of an advertiser."""
        own = self._ads[advertiser]
        return own[stable_integer("ad", self._seed, user, advertiser) % len(own)]

    def ads(self, names: Sequence[str], ranking: Ranking) -> NDArray[np.int64]:
        """Return (U, L): the ads of each user's advertisers."""
        return np.array([[self.ad(name, int(one)) for one in own] for name, own in zip(names, ranking, strict=True)])


def browse(ads: Mapping[str, NDArray[np.int64]], users: BrowsingUsers, *, pages: int, page_size: int) -> list[Visit]:
    """Return the visits of every user with every recommender, all of one page together.

    Args:
        ads: (U, L) ads for each user in order, by recommender; a visit ends where there are no more.
        users: Who plays them.
        pages: Most pages of a visit.
        page_size: Ads of a page.
    """
    visits = [Visit(name, user) for name, ad_UL in ads.items() for user in range(len(ad_UL))]
    going = visits
    with Progress(len(visits) * pages, description="browsing", unit="page") as progress:
        for page in range(pages):
            first = page * page_size
            going = [visit for visit in going if first < ads[visit.recommender].shape[1]]
            for visit in going:
                shown = ads[visit.recommender][visit.user, first : first + page_size]
                visit.shown.append(tuple(shown.tolist()))
            for visit, answer in zip(going, users.respond(going), strict=True):
                visit.answers.append(answer)
            going = [visit for visit in going if not visit.answers[-1].leaves]
            progress.update(len(visits))
    return visits
