"""Users who talk, played by fixed rules: each needs something today and will buy it from one advertiser.

Today's need k is drawn from the true interests as for browsing, and the advertiser from the world's p(a | k): the goal,
which nobody is told. The user opens with what it looks for in a searcher's words, answers questions on the topics of
``Topic`` truthfully, says what is wrong with what it is shown, and ends the conversation when its goal is there.

Letters of array shapes: U users, A advertisers.
"""

from collections.abc import Sequence
from enum import StrEnum

import numpy as np

from megatron_ads.data.simulator.population import next_advertiser_for
from megatron_ads.data.simulator.vocabulary import KINDS, PLACES, PRICES_ASKED, WORDINGS
from megatron_ads.data.simulator.world import World
from megatron_ads.user_simulation.latent_users import LatentUsers
from megatron_ads.user_simulation.scripted_users import draw_needs


class Topic(StrEnum):
    """What a user can be asked."""

    product = "product"
    """What exactly it looks for."""
    price = "price"
    """How much it wants to spend."""
    place = "place"
    """Where it lives."""
    shop = "shop"
    """Where it bought before."""


WRONG_PRICE = ("That is too expensive for me.", "That is too cheap for me.")
"""By the user's price level."""
_SHOPS = 2


class TalkingUsers:
    """Says what all users of a business say."""

    def __init__(self, world: World, users: LatentUsers, *, seed: int) -> None:
        draw = np.random.default_rng([seed, 4])
        self._world, self._users = world, users
        self.need_U = draw_needs(users.moment, draw)
        self.chance_UA = next_advertiser_for(users.moment, world, self.need_U)
        """p(a | k) of each user's need."""
        cumulated_UA = np.cumsum(self.chance_UA, axis=1)
        self.goal_U = (draw.random(len(users))[:, None] * cumulated_UA[:, -1:] >= cumulated_UA).sum(axis=1)
        self._wording_U = draw.integers(WORDINGS, size=len(users))

    def opening(self, user: int) -> str:
        """Return what a user begins with."""
        return f"I am looking for: {self._asked_as(user)}."

    def answer(self, user: int, topic: Topic) -> str:
        """Return what a user says to a question."""
        moment = self._users.moment
        match topic:
            case Topic.product:
                return f"I mean {KINDS[int(self.need_U[user])].name}."
            case Topic.price:
                return f"Something {PRICES_ASKED[int(moment.price_U[user])][int(self._wording_U[user])]}."
            case Topic.place:
                return f"I live in {PLACES[int(self._users.place_U[user])]}."
            case Topic.shop:
                numbers = self._users.latest_advertisers(user, _SHOPS)
                shops = [self._world.advertisers[number].name for number in numbers]
                return f"I bought from {' and '.join(shops)} lately." if shops else "I have not bought anything lately."

    def reply(self, user: int, shown: Sequence[int]) -> tuple[bool, str]:
        """Return whether the goal is among the advertisers shown, and what the user says to them."""
        if int(self.goal_U[user]) in shown:
            return True, f"Yes, {self._world.advertisers[int(self.goal_U[user])].name} is what I want. Thank you."
        shops, need = [self._world.advertisers[number] for number in shown], int(self.need_U[user])
        if not any(need in shop.kinds for shop in shops):
            return False, f"None of these sells what I need: {self._asked_as(user)}."
        level = int(self._users.moment.price_U[user])
        if not any(shop.price == level for shop in shops):
            return False, f"None of these. {WRONG_PRICE[level]}"
        return False, "None of these."

    def _asked_as(self, user: int) -> str:
        return KINDS[int(self.need_U[user])].asked_as[int(self._wording_U[user])]
