"""What changes from day to day: what users need, whom they bought from, and what their history tells of them.

Letters of array shapes: U users, K kinds, M remembered conversions, N users of a day.
"""

import numpy as np
from numpy.typing import NDArray

from megatron_ads.data.simulator.population import ACTIVITY_PARAMETERS, Population
from megatron_ads.data.simulator.preferences import NOBODY, PERSISTENCE, REMEMBERED, Moment


class UserState:
    """Where users stand at the end of a day."""

    def __init__(self, people: Population) -> None:
        """Start before the first day."""
        count, kinds = people.interest_UK.shape
        self._people = people
        self._cumulated_UK = np.cumsum(people.interest_UK, axis=1)
        self.need_U = np.full(count, NOBODY)
        self.recent_UM = np.full((count, REMEMBERED), NOBODY)
        self.recent_day_UM = np.zeros((count, REMEMBERED), dtype=np.int64)
        self._drawn_UK = np.zeros((count, kinds))
        """How often each kind was drawn from the interests, as far as the history tells."""
        self._sessions_U = np.zeros(count)

    def next_needs(self, user: NDArray[np.int64], draw: np.random.Generator) -> NDArray[np.int64]:
        """Draw the needs of these users' next sessions."""
        before, cumulated_NK = self.need_U[user], self._cumulated_UK[user]
        passed_NK = draw.random(len(user))[:, None] * cumulated_NK[:, -1:] >= cumulated_NK
        fresh = passed_NK.sum(axis=1).clip(max=cumulated_NK.shape[1] - 1)
        stays = (before != NOBODY) & (draw.random(len(user)) < PERSISTENCE)
        need: NDArray[np.int64] = np.where(stays, before, fresh)
        self._learn(user, before, need)
        self.need_U[user] = need
        return need

    def _learn(self, user: NDArray[np.int64], before: NDArray[np.int64], need: NDArray[np.int64]) -> None:
        """Count a changed need as drawn, an unchanged one by the probability that it was (assumed-density filter)."""
        guess = (self._people.prior_UK[user, need] + self._drawn_UK[user, need]) / (
            self._people.prior_UK[user].sum(axis=1) + self._drawn_UK[user].sum(axis=1)
        )
        share = (1 - PERSISTENCE) * guess
        self._drawn_UK[user, need] += np.where(need == before, share / (share + PERSISTENCE), 1.0)
        self._sessions_U[user] += 1

    def remember(self, user: NDArray[np.int64], advertiser: NDArray[np.int64], day: int) -> None:
        """Put a conversion in front of each of these users' others."""
        for table, newest in ((self.recent_UM, advertiser), (self.recent_day_UM, np.full(len(user), day))):
            table[user, 1:] = table[user, :-1]
            table[user, 0] = newest

    def true(self, day: int) -> Moment:
        """Return this moment with the users' true interests and activity."""
        return self._moment(day, self._people.interest_UK, self._people.activity_U)

    def known(self, day: int) -> Moment:
        """Return this moment with what the history and the model's parameters say of interests and activity."""
        counts_UK = self._people.prior_UK + self._drawn_UK
        often, seldom = ACTIVITY_PARAMETERS
        activity_U = (often + self._sessions_U) / (often + seldom + day + 1)
        return self._moment(day, counts_UK / counts_UK.sum(axis=1, keepdims=True), activity_U)

    def _moment(self, day: int, interest_UK: NDArray[np.float64], activity_U: NDArray[np.float64]) -> Moment:
        return Moment(
            day=day,
            need_U=self.need_U.copy(),
            recent_UM=self.recent_UM.copy(),
            recent_day_UM=self.recent_day_UM.copy(),
            interest_UK=interest_UK,
            activity_U=activity_U,
            price_U=self._people.price_U,
        )
