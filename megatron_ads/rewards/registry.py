"""The rewards of a recipe: built-in ones by name, and a team's own functions, each kept from harming a run.

What raises, is no finite number or takes too long loses the values of the unit that it happened to, is counted, and
told in one line a step. The run ends only where a reward has no value at all because of that.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ads.config.rl import RewardConfig, RewardsConfig
from megatron_ads.errors import ConfigError, DataError, one_line
from megatron_ads.observability.log import get_logger
from megatron_ads.rewards.label_agreement import LabelAgreement
from megatron_ads.rewards.reward import Fault, Reward, units_of, with_settings
from megatron_ads.rollouts import Rollout

logger = get_logger(__name__)

BUILT_IN: dict[str, type[Any]] = {"label_agreement": LabelAgreement}
"""Dataclasses whose fields are the settings of a reward."""

Outcome = Sequence[Any] | tuple[Fault, str]
"""Of one unit: its values, or what went wrong."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """What rollouts are worth."""

    values: dict[str, NDArray[np.float64]]
    """(N,) by reward; NaN where there is none."""
    faults: Counter[str]
    """Rollouts without a value because something went wrong, by ``REWARD/FAULT``."""


class Rewards:
    """The rewards of a recipe."""

    def __init__(self, rewards: dict[str, Callable[[Sequence[Rollout]], Iterator[tuple[int, Outcome]]]]) -> None:
        self._rewards = rewards

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        """Return what rollouts are worth; those of one prompt must be consecutive.

        Raises:
            DataError: If a reward failed for all rollouts that it judges.
        """
        faults: Counter[str] = Counter()
        values = {name: _collect(name, rollouts, judge, faults) for name, judge in self._rewards.items()}
        return Scores(values=values, faults=faults)

    def close(self) -> None:
        """End the processes of own functions."""


def open_rewards(config: RewardsConfig) -> Rewards:
    """Return the rewards of a recipe.

    Raises:
        ConfigError: If one is not known, or has no such setting.
    """
    return Rewards({reward.name: _judge(reward, f"rewards.use[{place}]") for place, reward in enumerate(config.use)})


def _judge(config: RewardConfig, section: str) -> Callable[[Sequence[Rollout]], Iterator[tuple[int, Outcome]]]:
    if config.name not in BUILT_IN:
        raise ConfigError(f"{section}.name is {config.name!r}; built in are {', '.join(BUILT_IN)}.")
    reward: Reward = with_settings(BUILT_IN[config.name], config.settings, section)

    def judge(rollouts: Sequence[Rollout]) -> Iterator[tuple[int, Outcome]]:
        for unit in units_of(rollouts, reward.unit):
            try:
                yield len(unit), reward(unit)
            except DataError as error:
                yield len(unit), (Fault.raised, str(error))

    return judge


def _collect(
    name: str,
    rollouts: Sequence[Rollout],
    judge: Callable[[Sequence[Rollout]], Iterator[tuple[int, Outcome]]],
    faults: Counter[str],
) -> NDArray[np.float64]:
    values: list[float] = []
    failed: Counter[str] = Counter()
    first = ""
    for size, outcome in judge(rollouts):
        if isinstance(outcome, tuple):
            values += [np.nan] * size
            failed[outcome[0]] += size
            first = first or f"{outcome[0]}: {one_line(Exception(outcome[1]))}"
            continue
        values += [np.nan if value is None else float(value) for value in outcome]
    faults.update({f"{name}/{fault}": count for fault, count in failed.items()})
    if failed:
        told = f"The reward {name} failed for {failed.total()} of {len(rollouts)} rollouts ({first})"
        if np.isnan(values).all():
            raise DataError(f"{told} and has a value for none. Correct it, or its settings.")
        logger.warning("%s.", told)
    return np.array(values)
