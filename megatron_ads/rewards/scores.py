"""What rollouts are worth by each reward, and what failed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_ads.rewards.reward import Outcome, RewardFailure


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """What N rollouts are worth."""

    values: dict[str, NDArray[np.float64]]
    """(N,) by reward; NaN where there is none."""
    failures: dict[str, dict[int, RewardFailure]] = field(default_factory=dict)
    """By reward, of the rollouts at these places; a reward that did not fail is not there."""

    @property
    def faults(self) -> Counter[str]:
        """Rollouts without a value because something went wrong, by ``REWARD/FAULT``."""
        return Counter(f"{name}/{each.fault}" for name, of in self.failures.items() for each in of.values())


def scores_of(outcomes: Mapping[str, Sequence[Outcome]]) -> Scores:
    """Return the outcomes of each reward, one for each rollout, as scores."""
    failures = {
        name: {place: each for place, each in enumerate(found) if isinstance(each, RewardFailure)}
        for name, found in outcomes.items()
    }
    return Scores(
        values={name: np.array([*map(_value, found)], dtype=np.float64) for name, found in outcomes.items()},
        failures={name: found for name, found in failures.items() if found},
    )


def joined(parts: Sequence[Scores]) -> Scores:
    """Return the scores of several draws, at least one, as those of their rollouts together."""
    names, failures, start = parts[0].values, dict[str, dict[int, RewardFailure]](), 0
    for part in parts:
        for name, found in part.failures.items():
            failures.setdefault(name, {}).update({start + place: each for place, each in found.items()})
        start += max(map(len, part.values.values()), default=0)
    return Scores(values={name: np.concatenate([part.values[name] for part in parts]) for name in names},
                  failures=failures)  # fmt: skip


def _value(outcome: Outcome) -> float:
    return outcome if isinstance(outcome, float) else np.nan
