"""How much each of several rewards counts: as the recipe says, or as POPO or POPO-light follow the training.

With L_k the objective that reward k alone would give, mu and sigma its mean and standard deviation within groups:

    w_k = w~_k / sum_j w~_j
    POPO        w~_k <- w~_k exp(eta I_k / mu_reg),    I_k = <grad L_k, sum_j grad L_j>          (eq. 5-6)
    POPO-light  w~_k = sigma_k / (|mu_k| + epsilon)                                             (eq. 7)

Both start from the weights of the recipe, normalised: equal ones unless it says otherwise. POPO multiplies the
normalised weights, which is the same: a factor common to all w~ cancels. POPO-light's mu and sigma are means over the
groups of a step that have at least two values (the paper says "within-group" and no more); while no reward varies at
all, the weights stay.

Source: Taiji, section 2.3.3.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ads.config.rl import Combine, RewardsConfig
from megatron_ads.errors import CheckpointError
from megatron_ads.observability.log import get_logger

logger = get_logger(__name__)

EPSILON = 1e-6
"""POPO-light: keeps a reward whose mean is 0 from infinity."""


class RewardWeights:
    """The weights of a recipe's rewards; every rank holds the same ones, as long as all are told the same."""

    def __init__(self, config: RewardsConfig) -> None:
        """Start from the recipe's weights."""
        self._config = config
        given = {reward.name: reward.weight for reward in config.use}
        self._current = given if config.combine is Combine.fixed else _normalised(given)

    @property
    def current(self) -> dict[str, float]:
        """w_k by reward, for the next update."""
        return dict(self._current)

    def observe(self, values: Mapping[str, NDArray[np.float64]], group_N: Sequence[int] | NDArray[np.int64]) -> None:
        """Follow the spread of the rewards, with POPO-light; otherwise do nothing.

        Args:
            values: (N,) by reward, of all rollouts of the step, not of this rank alone; NaN where there is none.
            group_N: Number of each rollout's group.
        """
        if self._config.combine is not Combine.popo_light:
            return
        raw = {name: _variation(values[name], np.asarray(group_N)) for name in self._current}
        if any(raw.values()):
            self._current = _normalised(raw)

    def update(self, inner_products: Mapping[str, float]) -> None:
        """Follow the gradients, with POPO; otherwise do nothing.

        Args:
            inner_products: I_k by reward, over all parameters and replicas.
        """
        if self._config.combine is not Combine.popo:
            return
        if not all(map(math.isfinite, inner_products.values())):
            logger.warning("the inner products of the rewards' gradients are %s; the weights stay.", inner_products)
            return
        scale = self._config.popo_step_size / self._config.popo_temperature
        exponents = {name: scale * inner_products[name] for name in self._current}
        # The largest cancels: nothing overflows. A weight that rounding has made 0 stays 0, and does not set it.
        largest = max(exponents[name] for name, weight in self._current.items() if weight)
        self._current = _normalised(
            {name: weight * math.exp(min(exponents[name] - largest, 0.0)) for name, weight in self._current.items()}
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"weights": self.current}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict`` returned; fixed weights are the recipe's all the same.

        Raises:
            CheckpointError: If it is of other rewards.
        """
        weights = state["weights"]
        if weights.keys() != self._current.keys():
            raise CheckpointError(
                f"the checkpoint has weights of the rewards {', '.join(weights)}; rewards.use names "
                f"{', '.join(self._current)}. Continue with the same ones, or start from its weights in a new folder."
            )
        if self._config.combine is not Combine.fixed:
            self._current = dict(weights)


def _normalised(weights: Mapping[str, float]) -> dict[str, float]:
    total = math.fsum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _variation(value_N: NDArray[np.float64], group_N: NDArray[np.int64]) -> float:
    """Return sigma / (|mu| + epsilon); 0 without a group of two values."""
    group_N, value_N = group_N[~np.isnan(value_N)], value_N[~np.isnan(value_N)]
    groups = [value_N[group_N == group] for group in np.unique(group_N)]
    groups = [each for each in groups if len(each) > 1]
    if not groups:
        return 0.0
    sigma = np.mean([each.std() if np.ptp(each) else 0.0 for each in groups])  # rounding gives equal values a spread
    mu = np.mean([each.mean() for each in groups])
    return float(sigma / (abs(mu) + EPSILON))
