"""What becomes of answers that are too long, ``rollout.overlong``, for all that looks at the rewards of a step.

Files of rollouts hold the rewards themselves, so that another job may treat them otherwise.

Shape suffix: N = answers, of whole groups.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_ads.config.rl import Overlong, RolloutConfig
from megatron_ads.losses.advantages import without_variance
from megatron_ads.rollouts import Rollout


def overlong_penalty(config: RolloutConfig, answer_tokens: int) -> float:
    """Return what is taken off the reward of an answer of so many tokens: 0 to 1 over the buffer (DAPO, eq. 13)."""
    if config.overlong is not Overlong.shape:
        return 0.0
    return max(0.0, (answer_tokens - (config.max_new_tokens - config.overlong_buffer)) / config.overlong_buffer)


def shaped(
    rewards: Mapping[str, NDArray[np.float64]], rollouts: Sequence[Rollout], config: RolloutConfig
) -> dict[str, NDArray[np.float64]]:
    """Return rewards, (N,) by name, with what is taken off for length."""
    penalty_N = np.array([overlong_penalty(config, len(rollout.answer_tokens)) for rollout in rollouts])
    return {name: values_N - penalty_N for name, values_N in rewards.items()}


def is_masked(rollout: Rollout, config: RolloutConfig) -> bool:
    """Return whether an answer is left out of the loss because it was cut off."""
    return config.overlong is Overlong.mask and rollout.cut_off


def groups_that_teach_nothing(
    values_N: NDArray[np.float64], rollouts: Sequence[Rollout], config: RolloutConfig
) -> list[int]:
    """Return the numbers of the groups without variance, and of those all of whose answers are masked, ascending.

    Masked answers count in the mean and in the variance of the others of their group, as in TRL
    (``mask_truncated_completions``).
    """
    groups_N = [rollout.group for rollout in rollouts]
    unmasked = {rollout.group for rollout in rollouts if not is_masked(rollout, config)}
    return sorted({*groups_N} - unmasked | {*without_variance(values_N, np.array(groups_N))})
