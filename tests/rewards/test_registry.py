"""Built-in rewards do not end a job, whatever they raise."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest

from megatron_ads.rewards.registry import BUILT_IN
from megatron_ads.rewards.reward import Unit
from megatron_ads.rollouts import Rollout
from tests.rewards.rollouts import answers, chat_row, failures, rewards


@dataclass(kw_only=True, slots=True)
class Mistaken:
    """Judges lengths, and cannot divide by 0."""

    unit: ClassVar[Unit] = Unit.group

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        return [1 / len(rollout.text) for rollout in rollouts]


def test_a_mistake_in_a_built_in_reward_is_named_counted_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUILT_IN, "mistaken", Mistaken)
    rollouts = [*answers(chat_row("a"), ["12", ""]), *answers(chat_row("b"), ["12"], group=1)]
    scores = rewards("mistaken").score(rollouts)
    assert scores.values["mistaken"][2] == 0.5 and scores.faults == {"mistaken/raised": 2}
    assert failures(scores) == ["raised: ZeroDivisionError: division by zero"] * 2
