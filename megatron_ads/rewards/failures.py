"""What failed of a step's rewards: told in one line, and the end of a run in which nothing else is left.

A run ends

    at a step       if no reward has a value for any of its answers, those of all its draws together, and rewards failed
                    for all of these, or for answers to at least two prompts
    by a reward     if it has not had a value yet in this run, and has failed for answers to at least two prompts

Anything else costs the answers that it happened to: the failure of one prompt, however few others a reward judges, and
a whole step of a reward that has had values before while others have some. The second rule ends a run early whose
reward is misconfigured although others teach it something. Which rewards have had values is part of a checkpoint, so
that a job that continues judges a step as it did before; failures are counted anew.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_ads.errors import DataError
from megatron_ads.observability.log import get_logger
from megatron_ads.rewards.reward import Fault, RewardFailure
from megatron_ads.rewards.scores import Scores
from megatron_ads.rollouts import Rollout

logger = get_logger(__name__)

_PROMPTS = 2
"""Failures of so many are not the fault of one."""


def counts_of(failures: Iterable[RewardFailure]) -> Counter[Fault]:
    """Return how many rollouts each fault cost."""
    return Counter(failure.fault for failure in failures)


def described(judge: str, failures: Sequence[RewardFailure], rollouts: int) -> str:
    """Return in one line, without an end, what of a judge failed for how many of its rollouts."""
    named = ", ".join(f"{count} {fault}" for fault, count in counts_of(failures).most_common())
    return f"The {judge} failed for {len(failures)} of {rollouts} rollouts ({named}; {failures[0].text})"


def log_failures(scores: Scores) -> None:
    """Log in one line what of each reward failed."""
    for name, failures in scores.failures.items():
        logger.warning("%s.", _described(name, failures, scores))


class RewardHistory:
    """Which rewards have had a value in this run, and for which prompts the others failed."""

    def __init__(self) -> None:
        """Start with none."""
        self._valued: set[str] = set()
        """By the steps that were trained: the same on every rank."""
        self._valued_here: set[str] = set()
        """By what this process has scored, which may be ahead of them."""
        self._failed_prompts: defaultdict[str, set[str]] = defaultdict(set)

    def observe(self, values: Mapping[str, NDArray[np.float64]]) -> None:
        """Remember which rewards have values in a step that is trained, (N,) by name, NaN where there is none."""
        self._valued |= _with_values(values)

    def require_values(self, rollouts: Sequence[Rollout], scores: Scores) -> None:
        """Refuse the scores of all answers of a step where the run ends.

        Raises:
            DataError: Naming a reward and what failed.
        """
        with_values = _with_values(scores.values)
        self._valued_here |= with_values
        failed = {place for failures in scores.failures.values() for place in failures}
        if not with_values and failed and (len(failed) == len(rollouts) or len(_prompts(rollouts, failed)) >= _PROMPTS):
            name, failures = max(scores.failures.items(), key=lambda each: len(each[1]))
            raise DataError(f"{_described(name, failures, scores)} and has a value for none. {_ADVICE}")
        for name, failures in scores.failures.items():
            self._failed_prompts[name] |= _prompts(rollouts, failures)
            if name not in self._valued | self._valued_here and len(self._failed_prompts[name]) >= _PROMPTS:
                raise DataError(
                    f"{_described(name, failures, scores)} and has a value for none, nor has it had one before in "
                    f"this run. {_ADVICE}"
                )

    def state_dict(self) -> list[str]:
        """Return what a checkpoint keeps."""
        return sorted(self._valued)

    def load_state_dict(self, state: Iterable[str]) -> None:
        """Continue from what ``state_dict`` returned."""
        self._valued = set(state)


_ADVICE = "Correct it, or its settings."


def _described(name: str, failures: Mapping[int, RewardFailure], scores: Scores) -> str:
    return described(f"reward {name}", [*failures.values()], len(scores.values[name]))


def _with_values(values: Mapping[str, NDArray[np.float64]]) -> set[str]:
    return {name for name, values_N in values.items() if not np.isnan(values_N).all()}


def _prompts(rollouts: Sequence[Rollout], places: Iterable[int]) -> set[str]:
    return {rollouts[place].row.id for place in places}
