"""Users: who they are, what they need from day to day, and which advertiser they convert with next.

A user's need stays the same from session to session with probability ``PERSISTENCE``, else it is drawn from the user's
interests. A session converts with probability ``CONVERSION``, whatever came before, and then with advertiser a at

    p(a) = LOYALTY * loyal(a) + INTENT * intent(a | need, price level) + REST * popularity(a),

where loyal(a) weighs the remembered conversions by ``DECAY`` ** days; without any, its share goes to the intent. All
ages grow alike, so that loyal(a) is the same on any later day before the next conversion. The simulation draws from
these probabilities, and they are reported as the best reachable answer.

Letters of array shapes: U users, K kinds, A advertisers, M remembered conversions, N users of a day.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_ads.data.simulator.vocabulary import AGES, DEPARTMENTS, GENDERS, KINDS_PER_DEPARTMENT, PLACES, PRICES
from megatron_ads.data.simulator.world import World

CONCENTRATION = 2.0
"""Sum of the parameters of the Dirichlet distribution of interests; a small one makes few kinds stand out."""
_SEGMENT_SPREAD = 0.7
ACTIVITY_PARAMETERS = (2.0, 4.0)
"""Beta distribution of the probability of a session on a day."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Population:
    """Users; ``interest_UK`` and ``activity_U`` are never shown to a model."""

    first_user: int
    age_U: NDArray[np.int64]
    gender_U: NDArray[np.int64]
    place_U: NDArray[np.int64]
    price_U: NDArray[np.int64]
    interest_UK: NDArray[np.float64]
    """Probability of each kind when a need is drawn."""
    activity_U: NDArray[np.float64]
    """Probability of a session on a day."""
    prior_UK: NDArray[np.float64]
    """Parameters that the interests were drawn with; they follow from age and gender."""


def segment_priors(seed: int) -> NDArray[np.float64]:
    """Return (ages, genders, K): parameters of the distribution of interests of each segment of users."""
    draw = np.random.default_rng([seed, 1])
    shape = (len(AGES), len(GENDERS), len(DEPARTMENTS))
    share = draw.lognormal(0.0, _SEGMENT_SPREAD, shape)
    share /= share.sum(axis=-1, keepdims=True)
    priors: NDArray[np.float64] = np.repeat(share / KINDS_PER_DEPARTMENT, KINDS_PER_DEPARTMENT, axis=-1) * CONCENTRATION
    return priors


def draw_population(
    draw: np.random.Generator, priors: NDArray[np.float64], *, first_user: int, count: int
) -> Population:
    """Draw ``count`` users."""
    age_U = draw.integers(len(AGES), size=count)
    gender_U = draw.choice(len(GENDERS), size=count, p=(0.48, 0.42, 0.1))
    prior_UK = priors[age_U, gender_U]
    # A Dirichlet draw is normalised gamma draws; the smallest number keeps a user of tiny draws from being undefined.
    gamma_UK = draw.standard_gamma(prior_UK) + np.finfo(np.float64).tiny
    return Population(
        first_user=first_user,
        age_U=age_U,
        gender_U=gender_U,
        place_U=draw.integers(len(PLACES), size=count),
        price_U=draw.integers(len(PRICES), size=count),
        interest_UK=gamma_UK / gamma_UK.sum(axis=1, keepdims=True),
        activity_U=draw.beta(*ACTIVITY_PARAMETERS, size=count),
        prior_UK=prior_UK,
    )


PERSISTENCE = 0.75
CONVERSION = 0.3
LOYALTY, INTENT, REST = 0.45, 0.5, 0.05
DECAY = 0.9
"""What is left of the weight of a conversion after a day."""
REMEMBERED = 8
"""Number of latest conversions that count towards loyalty."""
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
    """As in ``Population``: the true one, or what the history suggests; so is the activity."""
    activity_U: NDArray[np.float64]
    price_U: NDArray[np.int64]


def loyalty_weights(recent_UM: NDArray[np.int64], age_UM: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the share of each remembered conversion, 0 where there is none; a user without any has only zeros."""
    weights_UM = np.where(recent_UM == NOBODY, 0.0, DECAY ** age_UM.astype(np.float64))
    total_U = weights_UM.sum(axis=1, keepdims=True)
    shares: NDArray[np.float64] = weights_UM / np.where(total_U > 0, total_U, 1.0)
    return shares


def next_advertiser(moment: Moment, world: World, *, window_days: int) -> NDArray[np.float64]:
    """Return (U, A): the probability of each advertiser to be the next, given a conversion within ``window_days``."""
    same_U = np.where(moment.need_U == NOBODY, 0.0, same_need(moment.activity_U, window_days=window_days))
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


def next_advertiser_for(moment: Moment, world: World, need_U: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return (U, A): the probability of each advertiser to be converted with by users who need these kinds."""
    need_UK = np.eye(moment.interest_UK.shape[1])[need_U]
    drawn = replace(moment, need_U=np.full_like(need_U, NOBODY), interest_UK=need_UK)
    return next_advertiser(drawn, world, window_days=1)


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


class UserState:
    """The current state of users at the end of a day."""

    def __init__(self, people: Population) -> None:
        count = len(people.interest_UK)
        self._people = people
        self._cumulated_UK = np.cumsum(people.interest_UK, axis=1)
        self.need_U = np.full(count, NOBODY)
        self.recent_UM = np.full((count, REMEMBERED), NOBODY)
        self.recent_day_UM = np.zeros((count, REMEMBERED), dtype=np.int64)
        self._drawn_UK = np.zeros_like(people.interest_UK)
        """How often each kind was drawn from the interests, as far as the history tells."""
        self._sessions_U = np.zeros(count)

    def next_needs(self, user: NDArray[np.int64], draw: np.random.Generator) -> NDArray[np.int64]:
        """Draw the needs of these users' next sessions, and count what they tell of the interests."""
        before, cumulated_NK = self.need_U[user], self._cumulated_UK[user]
        passed_NK = draw.random(len(user))[:, None] * cumulated_NK[:, -1:] >= cumulated_NK
        fresh = passed_NK.sum(axis=1).clip(max=cumulated_NK.shape[1] - 1)
        stays = (before != NOBODY) & (draw.random(len(user)) < PERSISTENCE)
        need: NDArray[np.int64] = np.where(stays, before, fresh)
        # A changed need counts as drawn, an unchanged one by the probability that it was (assumed-density filter).
        prior_UK, drawn_UK = self._people.prior_UK, self._drawn_UK
        total = prior_UK[user].sum(axis=1) + drawn_UK[user].sum(axis=1)
        share = (1 - PERSISTENCE) * ((prior_UK[user, need] + drawn_UK[user, need]) / total)
        drawn_UK[user, need] += np.where(need == before, share / (share + PERSISTENCE), 1.0)
        self._sessions_U[user] += 1
        self.need_U[user] = need
        return need

    def remember(self, user: NDArray[np.int64], advertiser: NDArray[np.int64], day: int) -> None:
        """Put a conversion in front of each of these users' others."""
        for table, newest in ((self.recent_UM, advertiser), (self.recent_day_UM, np.full(len(user), day))):
            table[user, 1:] = table[user, :-1]
            table[user, 0] = newest

    def moments(self, day: int) -> tuple[Moment, Moment]:
        """Return this moment, with what the history says of interests and activity, and with the true ones."""
        counts_UK = self._people.prior_UK + self._drawn_UK
        often, seldom = ACTIVITY_PARAMETERS
        known = Moment(
            day=day,
            need_U=self.need_U.copy(),
            recent_UM=self.recent_UM.copy(),
            recent_day_UM=self.recent_day_UM.copy(),
            interest_UK=counts_UK / counts_UK.sum(axis=1, keepdims=True),
            activity_U=(often + self._sessions_U) / (often + seldom + day + 1),
            price_U=self._people.price_U,
        )
        return known, replace(known, interest_UK=self._people.interest_UK, activity_U=self._people.activity_U)
