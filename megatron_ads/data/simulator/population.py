"""The users of the simulated world: who they are, and what they are interested in.

Letters of array shapes: U users, K kinds.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_ads.data.simulator.vocabulary import (
    AGES,
    DEPARTMENTS,
    GENDERS,
    KINDS,
    KINDS_PER_DEPARTMENT,
    PLACES,
    PRICES,
)

K = len(KINDS)
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
    """Price level that the user buys at."""
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
