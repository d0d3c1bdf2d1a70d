"""Users played by fixed rules: they decide by what they truly need and like, with noise, position and patience.

Today's need k is the last one with probability PERSISTENCE, else drawn from the true interests. With p(a | k) as the
world has it, of an ad d of advertiser a on place i of a page (from 0):

    want(d)  = b + (1 - b) * curiosity(d | k)     b = WILLING * p(a | k) / max_a' p(a' | k) * offer(d)
    looked   = attention ** i * (GLANCE + (1 - GLANCE) * want(d) / MOST)
    clicked  = (1 - noise) * want(d) + noise / 2, once looked at
    leaves   once pages, those with a click counted half, are as many as the patience, drawn from an exponential
             distribution
    satisfaction = 1 + 4 * (max want + mean want of the ads shown) / (2 * MOST) + N(0, 1/2), rounded, within 1 to 5

offer(d) is 1 for an ad of the needed kind, else ``OTHER_OFFER``; MOST is the highest want there is. It is the form of
the world's own clicks; the numbers are ours. A user has the same need, patience and luck with every recommender, so
that recommenders are compared pair by pair.

Letters of array shapes: U users, A advertisers, D ads, P pages, S places of a page.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_ads.config.user_simulation import BrowseConfig
from megatron_ads.data.simulator.behaviour import CURIOSITY, curiosity
from megatron_ads.data.simulator.population import NOBODY, PERSISTENCE, Moment, next_advertiser_for
from megatron_ads.data.simulator.world import World
from megatron_ads.user_simulation.browsing import SATISFACTIONS, PageAnswer, Visit
from megatron_ads.user_simulation.latent_users import LatentUsers

WILLING, OTHER_OFFER, GLANCE = 0.6, 0.5, 0.5
MOST = WILLING + (1 - WILLING) * CURIOSITY
_SATISFACTION_SPREAD = 0.5


def draw_needs(moment: Moment, draw: np.random.Generator) -> NDArray[np.int64]:
    """Return (U,): the kind that each user needs in the session after the moment, drawn by the true interests."""
    cumulated_UK = np.cumsum(moment.interest_UK, axis=1)
    passed_UK = draw.random(len(moment.need_U))[:, None] * cumulated_UK[:, -1:] >= cumulated_UK
    fresh = passed_UK.sum(axis=1).clip(max=cumulated_UK.shape[1] - 1)
    stays = (moment.need_U != NOBODY) & (draw.random(len(moment.need_U)) < PERSISTENCE)
    need: NDArray[np.int64] = np.where(stays, moment.need_U, fresh)
    return need


def wants(world: World, moment: Moment, need_U: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return (U, D): how much each user wants each ad, as at the top of this file."""
    chance_UA = next_advertiser_for(moment, world, need_U)
    liking_UA = chance_UA / chance_UA.max(axis=1, keepdims=True)
    advertiser_D, kind_D, price_D, text_D = np.array(
        [(ad.advertiser, ad.kind, ad.price, ad.text) for ad in world.ads]
    ).T
    offer_UD = np.where(kind_D[None, :] == need_U[:, None], 1.0, OTHER_OFFER)
    buying_UD = WILLING * liking_UA[:, advertiser_D] * offer_UD
    curious_UD = curiosity(need_U[:, None], moment.price_U[:, None], kind_D[None, :], price_D[None, :], text_D[None, :])
    want_UD: NDArray[np.float64] = buying_UD + (1 - buying_UD) * curious_UD
    return want_UD


def expected_wants(world: World, moment: Moment) -> NDArray[np.float64]:
    """Return (U, D): how much each user wants each ad on average over the needs of the next session, in closed form."""
    users = np.arange(len(moment.need_U))
    stays_U = np.where(moment.need_U == NOBODY, 0.0, PERSISTENCE)
    share_UK = (1 - stays_U)[:, None] * moment.interest_UK
    share_UK[users, moment.need_U.clip(min=0)] += stays_U
    return sum(
        (
            share_UK[:, kind, None] * wants(world, moment, np.full_like(users, kind))
            for kind in range(share_UK.shape[1])
        ),
        start=np.zeros((len(users), len(world.ads))),
    )


class ScriptedUsers:
    """Plays all users of a business."""

    def __init__(self, world: World, users: LatentUsers, config: BrowseConfig) -> None:
        draw, shape = np.random.default_rng([config.seed, 3]), (len(users), config.pages, config.page_size)
        self._config = config.user
        self.need_U = draw_needs(users.moment, draw)
        self._want_UD = wants(world, users.moment, self.need_U)
        self._patience_U = draw.exponential(config.user.patience, len(users))
        self._mood_U = draw.normal(0.0, _SATISFACTION_SPREAD, len(users))
        self._looking_UPS, self._clicking_UPS = draw.random(shape), draw.random(shape)

    def respond(self, visits: Sequence[Visit]) -> list[PageAnswer]:
        """Return what each user does on the last page."""
        return [self._respond(visit) for visit in visits]

    def _respond(self, visit: Visit) -> PageAnswer:
        user, page, ads = visit.user, len(visit.answers), np.array(visit.shown[-1])
        want_S = self._want_UD[user, ads]
        place_S = self._config.attention ** np.arange(len(ads))
        looked_S = self._looking_UPS[user, page, : len(ads)] < place_S * (GLANCE + (1 - GLANCE) * want_S / MOST)
        chance_S = (1 - self._config.noise) * want_S + self._config.noise / 2
        clicked_S = looked_S & (self._clicking_UPS[user, page, : len(ads)] < chance_S)
        clicks = [bool(answer.clicked) for answer in visit.answers] + [bool(clicked_S.any())]
        used = sum(0.5 if clicked else 1.0 for clicked in clicks)
        return PageAnswer(
            looked=tuple(np.flatnonzero(looked_S).tolist()),
            clicked=tuple(np.flatnonzero(clicked_S).tolist()),
            leaves=bool(used >= self._patience_U[user]),
            satisfaction=self._satisfaction(visit),
        )

    def _satisfaction(self, visit: Visit) -> int:
        want = self._want_UD[visit.user, [ad for page in visit.shown for ad in page]]
        felt = 1 + 4 * (want.max() + want.mean()) / (2 * MOST) + self._mood_U[visit.user]
        return int(np.clip(round(float(felt)), SATISFACTIONS[0], SATISFACTIONS[-1]))
