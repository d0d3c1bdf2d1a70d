"""The ads that a search shows, and what becomes of them; the probability of every click and conversion is known.

Whether a session converts through an ad of ours is drawn before the ads are. That gives a closed form:

    shown(d)     = ad d stands in a given slot
    P(shown)     = e / SLOTS * p(a) * offer(d) + (1 - e / SLOTS * q) * auction(d),    e = CONVERSION * ATTRIBUTED
    P(converted | shown) = e / SLOTS * p(a) * offer(d) / P(shown)
    P(clicked | shown)   = P(converted | shown) + (1 - P(converted | shown)) * curiosity(d)

where a is the advertiser of d, p(a) as in ``preferences``; offer(d) = 1 / ADS_PER_OFFER for an ad of the needed kind
and 0 for others; q is the probability that the advertiser converted with runs ads of the kind: a conversion with one
that does not is never attributed.

Letters of array shapes: D ads, K kinds, A advertisers, M remembered conversions, N sessions or impressions.
"""

import numpy as np
from numpy.typing import NDArray

from megatron_ads.data.simulator.preferences import CONVERSION, INTENT, LOYALTY, REST
from megatron_ads.data.simulator.sampling import InverseTable
from megatron_ads.data.simulator.sessions import Columns, Sessions
from megatron_ads.data.simulator.world import ADS_PER_OFFER, SPAM, World, close_kind

SLOTS = 4
ATTRIBUTED = 0.6
"""Share of the conversions of a session on our site that go through one of the ads shown, where there is one."""
_EVENT = CONVERSION * ATTRIBUTED / SLOTS
_CURIOSITY = 0.15
_CURIOSITY_CLOSE, _CURIOSITY_OTHER = 0.4, 0.1
"""Factors for ads of the kind that can stand in for the needed one, and of any other."""
_CURIOSITY_PRICE, _CURIOSITY_SPAM = 0.5, 0.3
"""Factors for ads of the other price level, and for spam."""


class ResultsPage:
    """Shows the ads of one world."""

    def __init__(self, world: World) -> None:
        """Lay the facts of the ads out as arrays."""
        self._world = world
        self._auction = InverseTable(world.auction_KD)
        self._advertiser_D = np.array([ad.advertiser for ad in world.ads])
        self._kind_D = np.array([ad.kind for ad in world.ads])
        self._price_D = np.array([ad.price for ad in world.ads])
        self._text_D = np.array([ad.text for ad in world.ads])
        self._close_K = np.array([close_kind(kind) for kind in range(len(world.auction_KD))])
        self._anyone_without_K = (world.first_ad_AK < 0).T @ world.popularity_A

    def show(self, sessions: Sessions, wanted_ad: NDArray[np.int64], draw: np.random.Generator) -> Columns:
        """Fill the slots of every session on our site; one holds ``wanted_ad``, which converts, where it is not -1."""
        onsite = np.flatnonzero(sessions.onsite)
        place = np.repeat(onsite, SLOTS)
        slot = np.tile(np.arange(SLOTS), len(onsite))
        winning = np.repeat(draw.integers(SLOTS, size=len(onsite)), SLOTS) == slot
        shown = sessions.take(place)
        ad = self._auction.draw(shown.kind, draw)
        converted = winning & (wanted_ad[place] >= 0)
        ad = np.where(converted, wanted_ad[place], ad)
        chance, curious = self._conversion_chance(shown, ad), self._curiosity(shown, ad)
        return {
            **shown.columns("query"),
            "slot": slot,
            "ad": ad,
            "clicked": converted | (draw.random(len(ad)) < curious),
            "converted": converted,
            "click_chance": chance + (1 - chance) * curious,
            "conversion_chance": chance,
        }

    def _conversion_chance(self, shown: Sessions, ad: NDArray[np.int64]) -> NDArray[np.float64]:
        advertiser = self._advertiser_D[ad]
        loyal = (shown.shares_NM * (shown.recent_NM == advertiser[:, None])).sum(axis=1)
        intent = self._world.intent_KPA[shown.kind, shown.price, advertiser]
        chance = REST * self._world.popularity_A[advertiser] + np.where(
            shown.has_bought, LOYALTY * loyal + INTENT * intent, (LOYALTY + INTENT) * intent
        )
        offer = np.where(self._kind_D[ad] == shown.kind, 1.0 / ADS_PER_OFFER, 0.0)
        through = _EVENT * chance * offer
        by_auction = (1.0 - _EVENT * (1.0 - self._without_ad(shown))) * self._world.auction_KD[shown.kind, ad]
        ratio: NDArray[np.float64] = through / (through + by_auction)
        return ratio

    def _without_ad(self, shown: Sessions) -> NDArray[np.float64]:
        """Return the probability that the advertiser converted with runs no ad of the kind: 1 - q."""
        elsewhere_NM = self._world.first_ad_AK[shown.recent_NM, shown.kind[:, None]] < 0
        loyal = (shown.shares_NM * elsewhere_NM).sum(axis=1)
        missing: NDArray[np.float64] = REST * self._anyone_without_K[shown.kind] + LOYALTY * loyal
        return missing

    def _curiosity(self, shown: Sessions, ad: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the probability of a click that no conversion stands behind."""
        kind = self._kind_D[ad]
        close = np.where(self._close_K[shown.kind] == kind, _CURIOSITY_CLOSE, _CURIOSITY_OTHER)
        related = np.where(kind == shown.kind, 1.0, close)
        price = np.where(self._price_D[ad] == shown.price, 1.0, _CURIOSITY_PRICE)
        text = np.where(self._text_D[ad] == SPAM, _CURIOSITY_SPAM, 1.0)
        curious: NDArray[np.float64] = _CURIOSITY * related * price * text
        return curious
