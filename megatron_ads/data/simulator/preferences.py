"""With which advertiser a user converts next: the probabilities that the simulation draws from, and reports as best.

A user's need stays the same from session to session with probability ``PERSISTENCE``, else it is drawn from the user's
interests. A session converts with probability ``CONVERSION``, whatever came before, and then with advertiser a at

    p(a) = LOYALTY * loyal(a) + INTENT * intent(a | need, price level) + REST * popularity(a),

where loyal(a) weighs the remembered conversions by ``DECAY`` ** days; without any, its share goes to the intent. All
ages grow alike, so that loyal(a) is the same on any later day before the next conversion.

Letters of array shapes: U users, K kinds, A advertisers, M remembered conversions.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_ads.data.simulator.world import World

PERSISTENCE = 0.75
CONVERSION = 0.3
LOYALTY, INTENT, REST = 0.45, 0.5, 0.05
DECAY = 0.9
"""What is left of the weight of a conversion after a day."""
REMEMBERED = 8
"""Conversions that play a part."""
NOBODY = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """What is known about users at the end of a day."""

    day: int
    need_U: NDArray[np.int64]
    """Kind of the latest session; ``NOBODY`` before the first."""
    recent_UM: NDArray[np.int64]
    """Advertisers of the latest conversions; ``NOBODY`` where there are fewer."""
    recent_day_UM: NDArray[np.int64]
    interest_UK: NDArray[np.float64]
    """Probability of each kind when a need is drawn: the true one, or what the history suggests."""
    activity_U: NDArray[np.float64]
    """Probability of a session on a day: the true one, or what the history suggests."""
    price_U: NDArray[np.int64]


def loyalty_weights(recent_UM: NDArray[np.int64], age_UM: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the share of each remembered conversion, 0 where there is none; a user without any has only zeros."""
    weights_UM = np.where(recent_UM == NOBODY, 0.0, DECAY ** age_UM.astype(np.float64))
    total_U = weights_UM.sum(axis=1, keepdims=True)
    shares: NDArray[np.float64] = weights_UM / np.where(total_U > 0, total_U, 1.0)
    return shares


def next_advertiser(moment: Moment, world: World, *, window_days: int) -> NDArray[np.float64]:
    """Return (U, A): the probability of each advertiser to be the next, given a conversion within ``window_days``."""
    same_U = same_need(moment.activity_U, window_days=window_days)
    same_U = np.where(moment.need_U == NOBODY, 0.0, same_U)
    need_UK = (1.0 - same_U)[:, None] * moment.interest_UK
    known = np.flatnonzero(moment.need_U != NOBODY)
    need_UK[known, moment.need_U[known]] += same_U[known]
    intent_UA = np.empty((len(same_U), len(world.advertisers)))
    for price in range(world.intent_KPA.shape[1]):
        chosen = moment.price_U == price
        intent_UA[chosen] = need_UK[chosen] @ world.intent_KPA[:, price]
    shares_UM = loyalty_weights(moment.recent_UM, moment.day - moment.recent_day_UM)
    has_U = shares_UM.sum(axis=1) > 0
    chance_UA: NDArray[np.float64] = np.where(has_U, INTENT, INTENT + LOYALTY)[:, None] * intent_UA
    chance_UA += REST * world.popularity_A
    users = np.arange(len(has_U))
    for place in range(REMEMBERED):
        advertiser_U = moment.recent_UM[:, place]
        held = advertiser_U != NOBODY
        np.add.at(chance_UA, (users[held], advertiser_U[held]), LOYALTY * shares_UM[held, place])
    return chance_UA


def same_need(activity_U: NDArray[np.float64], *, window_days: int) -> NDArray[np.float64]:
    """Return the probability that the need never changed until the next conversion, given one within the window.

    Two states are followed from day to day: not converted yet with the need kept, or with the need drawn anew.
    """
    kept, drawn = np.ones_like(activity_U), np.zeros_like(activity_U)
    converted_kept, converted_drawn = np.zeros_like(activity_U), np.zeros_like(activity_U)
    for _ in range(window_days):
        stays, changes = activity_U * PERSISTENCE * kept, activity_U * ((1 - PERSISTENCE) * kept + drawn)
        converted_kept += CONVERSION * stays
        converted_drawn += CONVERSION * changes
        kept = kept * (1 - activity_U) + (1 - CONVERSION) * stays
        drawn = drawn * (1 - activity_U) + (1 - CONVERSION) * changes
    same: NDArray[np.float64] = converted_kept / (converted_kept + converted_drawn)
    return same
