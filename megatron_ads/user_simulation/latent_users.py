"""Simulated users as they truly are: interests, needs and loyalty, of which no recommender is given any.

Letters of array shapes: U users, A advertisers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ads.data.simulator.folder import Scale
from megatron_ads.data.simulator.histories import LABEL_DAYS, draw_pieces
from megatron_ads.data.simulator.population import NOBODY, Moment, next_advertiser
from megatron_ads.data.simulator.world import World


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentUsers:
    """U users at the anchor."""

    names: Sequence[str]
    """What logs call them."""
    moment: Moment
    """With the true interests and activity."""
    place_U: NDArray[np.int64]
    chance_UA: NDArray[np.float64]
    """True probability of each advertiser to be converted with next, in closed form."""

    def __len__(self) -> int:
        return len(self.names)

    def latest_advertisers(self, user: int, most: int) -> list[int]:
        """Return whom a user bought from, the latest first and each once: loyalty decays with every day."""
        recent_M = self.moment.recent_UM[user]
        return list(dict.fromkeys(recent_M[recent_M != NOBODY].tolist()))[:most]


def draw_latent_users(world: World, scale: Scale, numbers: Mapping[str, int], *, days: int) -> LatentUsers:
    """Draw users of a simulation once more, up to the end of a day; what happens later is not drawn.

    Args:
        world: As the simulation has it.
        scale: Of the simulation.
        numbers: The users' names and their numbers in the simulation, which rise.
        days: How many.
    """
    wanted = np.array(list(numbers.values()))
    parts: list[Moment] = []
    places: list[NDArray[np.int64]] = []
    for piece in draw_pieces(world, users=min(scale.users, int(wanted[-1]) + 1), days=days, anchor=days - 1):
        assert piece.true is not None, "the anchor is one of the days"
        first, count = piece.people.first_user, len(piece.people.age_U)
        rows = wanted[(wanted >= first) & (wanted < first + count)] - first
        parts.append(_rows(piece.true, rows))
        places.append(piece.people.place_U[rows])
    moment = _joined(parts)
    return LatentUsers(
        names=list(numbers),
        moment=moment,
        place_U=np.concatenate(places),
        chance_UA=next_advertiser(moment, world, window_days=LABEL_DAYS),
    )


def _rows(moment: Moment, rows: NDArray[np.int64]) -> Moment:
    values = {field.name: getattr(moment, field.name) for field in fields(moment)}
    chosen: dict[str, Any] = {name: value[rows] for name, value in values.items() if isinstance(value, np.ndarray)}
    return replace(moment, **chosen)


def _joined(parts: Sequence[Moment]) -> Moment:
    arrays = [field.name for field in fields(Moment) if isinstance(getattr(parts[0], field.name), np.ndarray)]
    joined: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in arrays}
    return replace(parts[0], **joined)
