"""The metrics of a step, by verl's names: what its rollouts were like, and how long its phases took."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from megatron_ads.config.rl import RolloutConfig
from megatron_ads.rollouts import Rollout
from megatron_ads.training.rollout.dump import ScoredStep
from megatron_ads.training.rollout.overlong import groups_that_teach_nothing


def of_step(found: ScoredStep, weights: Mapping[str, float], config: RolloutConfig) -> dict[str, float]:
    """Return the metrics of a step's rollouts with shaped rewards; ``weights`` are those of the rewards."""
    lengths = [len(rollout.answer_tokens) for rollout in found.rollouts]
    return {
        **(_of_groups(found, weights, config) if found.rewards else {}),
        **_of_teacher(found.rollouts),
        "response_length/mean": float(np.mean(lengths)),
        "response_length/max": float(max(lengths)),
        "response_length/clip_ratio": float(np.mean([rollout.cut_off for rollout in found.rollouts])),
        "prompt_length/mean": float(np.mean([len(rollout.prompt_tokens) for rollout in found.rollouts])),
        "rollout/draws": float(found.draws),
        "rollout/answers": float(found.generated),
        **{f"rollout/faults/{name}": float(count) for name, count in found.faults.items()},
    }


def _of_groups(found: ScoredStep, weights: Mapping[str, float], config: RolloutConfig) -> dict[str, float]:
    together_N = combined(found.rewards, weights)
    with_reward = together_N[~np.isnan(together_N)]
    ends = {"max": with_reward.max(), "min": with_reward.min()} if len(with_reward) else {}
    return {
        **of_rewards("critic/rewards", found.rewards, weights),
        **{f"critic/rewards/{end}": value for end, value in ends.items()},
        "rollout/groups_without_variance": float(len(groups_that_teach_nothing(together_N, found.rollouts, config))),
    }


def _of_teacher(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Return the estimate of KL(policy that answered || teacher), 1/T sum_t log pi(o_t) - log pi_T(o_t)."""
    differences = [
        own - other
        for rollout in rollouts
        if rollout.teacher_log_probabilities is not None
        for own, other in zip(rollout.log_probabilities, rollout.teacher_log_probabilities, strict=True)
    ]
    return {"teacher/reverse_kl": float(np.mean(differences))} if differences else {}


def of_rewards(name: str, rewards: Mapping[str, NDArray[np.float64]], weights: Mapping[str, float]) -> dict[str, float]:
    """Return the mean of the weighted sum, ``NAME/mean``, and of each reward; without those that have no value."""
    means = {"mean": combined(rewards, weights), **{f"{each}/mean": values_N for each, values_N in rewards.items()}}
    return {
        f"{name}/{each}": float(np.nanmean(values_N))
        for each, values_N in means.items()
        if not np.isnan(values_N).all()
    }


def combined(rewards: Mapping[str, NDArray[np.float64]], weights: Mapping[str, float]) -> NDArray[np.float64]:
    """Return sum_k w_k r_k over the rewards that an answer has, (N,); NaN where it has none."""
    values_KN = np.array([weights[name] * values_N for name, values_N in rewards.items()])
    sums_N: NDArray[np.float64] = np.nansum(values_KN, axis=0)
    sums_N[np.isnan(values_KN).all(axis=0)] = np.nan
    return sums_N


class PhaseTimes:
    """Seconds of each phase since they were last taken; a phase that ends with a collective is as long as the slowest
    rank's."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @property
    def seconds(self) -> dict[str, float]:
        """Return the seconds by phase."""
        return dict(self._seconds)

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add what was measured elsewhere, by phase."""
        for phase, taken in seconds.items():
            self._seconds[phase] += taken

    @contextmanager
    def measured(self, phase: str) -> Iterator[None]:
        """Add the time inside the context to a phase."""
        started = time.monotonic()
        yield
        self._seconds[phase] += time.monotonic() - started

    def take(self) -> dict[str, float]:
        """Return the seconds by metric name, and begin anew."""
        taken = {f"timing_s/{phase}": seconds for phase, seconds in self._seconds.items()}
        self._seconds.clear()
        return taken
