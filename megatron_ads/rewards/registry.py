"""The rewards of a recipe: built-in ones by name, and a team's own functions, each kept from harming a run.

What raises or is no finite number, or a function that takes too long, loses the values of the unit that it happened
to, and is counted. ``failures.py`` says how that is told, and where it ends the run.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from megatron_ads.config.rl import RewardsConfig
from megatron_ads.errors import ConfigError, DataError, one_line
from megatron_ads.rewards.advertiser_ranking import AdvertiserRanking
from megatron_ads.rewards.ctcvr import Ctcvr
from megatron_ads.rewards.downstream import DownstreamBatch
from megatron_ads.rewards.label_agreement import LabelAgreement
from megatron_ads.rewards.list_ranking import ListRanking
from megatron_ads.rewards.own_function import require_there
from megatron_ads.rewards.retrieval import Retrieval
from megatron_ads.rewards.reward import Fault, Outcome, Reward, RewardFailure, outcomes_of, units_of, with_settings
from megatron_ads.rewards.scores import Scores, scores_of
from megatron_ads.rewards.semantic import Semantic
from megatron_ads.rewards.worker import Worker
from megatron_ads.rollouts import Rollout

BUILT_IN: dict[str, type[Any]] = {
    "advertiser_ranking": AdvertiserRanking,
    "ctcvr": Ctcvr,
    "downstream_batch": DownstreamBatch,
    "label_agreement": LabelAgreement,
    "list_ranking": ListRanking,
    "retrieval": Retrieval,
    "semantic": Semantic,
}
"""Dataclasses that are rewards; their fields are the settings."""
MAX_KILLS = 4
"""How often the process of a function may be lost in one step; what is then left has no value."""

Scoring = Callable[[Sequence[Rollout]], Iterator[list[Outcome]]]
"""Takes the rollouts of a step and yields the outcomes of one unit after another."""


class Rewards:
    """The rewards of a recipe."""

    def __init__(self, judges: Mapping[str, Scoring], workers: Sequence[Worker]) -> None:
        """Take what computes each reward, by name, and the processes among them."""
        self._judges, self._workers = judges, workers

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        """Return what rollouts are worth; those of one prompt must be consecutive.

        Raises:
            ConfigError: If a function of one's own cannot be imported or called.
        """
        return scores_of(
            {name: [each for of_unit in judge(rollouts) for each in of_unit] for name, judge in self._judges.items()}
        )

    def close(self) -> None:
        """End the processes of own functions."""
        for worker in self._workers:
            worker.close()


def open_rewards(config: RewardsConfig) -> Rewards:
    """Return the rewards of a recipe. Processes of own functions start with the first rollouts.

    Raises:
        ConfigError: If one is not known, or has no such setting.
    """
    judges: dict[str, Scoring] = {}
    workers = []
    for place, reward in enumerate(config.use):
        section = f"rewards.use[{place}]"
        if reward.is_own:
            require_there(reward.name, section)
            workers.append(worker := Worker(reward.name, reward.settings))
            judges[reward.name] = _own(worker, config.timeout_seconds)
        else:
            judges[reward.name] = _built_in(with_settings(_kind_of(reward.name, section), reward.settings, section))
    return Rewards(judges, workers)


def _kind_of(name: str, section: str) -> type[Any]:
    if name in BUILT_IN:
        return BUILT_IN[name]
    near = get_close_matches(name, BUILT_IN, n=1)
    offer = f"Did you mean {near[0]}?" if near else f"Built in are {', '.join(BUILT_IN)}."
    raise ConfigError(f"{section}.name is {name!r}. {offer} A function of one's own is module:function.")


def _built_in(reward: Reward) -> Scoring:
    def judge(rollouts: Sequence[Rollout]) -> Iterator[list[Outcome]]:
        for unit in units_of(rollouts, reward.unit):
            try:
                yield outcomes_of(reward(unit), len(unit))
            except DataError as error:
                yield [RewardFailure(Fault.raised, one_line(error))] * len(unit)
            except Exception as error:  # noqa: BLE001  # nothing that a reward raises may end the job
                yield [RewardFailure(Fault.raised, f"{type(error).__name__}: {one_line(error)}")] * len(unit)

    return judge


def _own(worker: Worker, timeout_seconds: float) -> Scoring:
    """Return what asks a process, in ``timeout_seconds`` for all units together, imports not counted.

    A unit that others follow may take half of the time that is left: of equally long ones none then takes too much, and
    one that hangs leaves time for the others.
    """

    def judge(rollouts: Sequence[Rollout]) -> Iterator[list[Outcome]]:
        left, kills = timeout_seconds, 0
        lost = RewardFailure(Fault.timed_out, f"the {timeout_seconds:g} s of a step were used up")
        units = list(units_of(rollouts, worker.start())) if rollouts else []
        for place, unit in enumerate(units, 1):
            if left <= 0 or kills == MAX_KILLS:
                yield [lost] * len(unit)
                continue
            worker.start()
            began = time.monotonic()
            found = worker.ask(unit, left / 2 if place < len(units) else left)
            left -= time.monotonic() - began
            if not worker.is_running and isinstance(found[0], RewardFailure):
                kills, lost = kills + 1, found[0]
            yield found

    return judge
