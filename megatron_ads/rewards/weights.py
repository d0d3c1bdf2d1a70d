"""How much each of several rewards counts: fixed, POPO or POPO-light."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ads.config.rl import Combine, RewardsConfig

_EPSILON = 1e-6


class RewardWeights:
    """Weights w_k of the rewards of a recipe, which follow them as ``rewards.combine`` says."""

    def __init__(self, config: RewardsConfig) -> None:
        self._config = config
        given = {reward.name: reward.weight for reward in config.use}
        self._current = given if config.combine is Combine.fixed else _normalised(given)

    @property
    def current(self) -> dict[str, float]:
        """The weights by reward, for the next update."""
        return dict(self._current)

    def observe(self, values: Mapping[str, NDArray[np.float64]], group_N: Sequence[int] | NDArray[np.int64]) -> None:
        """Follow the spread of the rewards within their groups (``popo_light``); else do nothing."""

    def update(self, inner_products: Mapping[str, float]) -> None:
        """Follow the inner products of the rewards' gradients (``popo``); else do nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"weights": dict(self._current)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict`` returned."""
        self._current = dict(state["weights"])


def _normalised(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}
