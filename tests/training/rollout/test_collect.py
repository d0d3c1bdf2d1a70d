"""A step's rollouts are drawn once: what is kept of them, and until when."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch.distributed as dist

from megatron_ads.config.recipes import load_job
from megatron_ads.config.rl import RlConfig
from megatron_ads.errors import DataError
from megatron_ads.rewards.registry import Rewards
from megatron_ads.rewards.reward import Fault, Outcome, RewardFailure
from megatron_ads.rollouts import Rollout
from megatron_ads.training.rollout import collect
from megatron_ads.training.rollout.collect import Collector, JobRewards
from megatron_ads.training.rollout.dump import ScoredStep, read_header, step_file
from megatron_ads.training.rollout.generation import AnswerSettings
from megatron_ads.training.rollout.metrics import PhaseTimes
from megatron_ads.training.rollout.prompts import PolicyPrompt
from tests.training.rollout.test_rollouts import prompt, rollout


@pytest.mark.parametrize("on_file", [True, False])
def test_the_journal_of_a_later_step_outlives_the_steps_that_are_taken_from_file(
    monkeypatch: pytest.MonkeyPatch, on_file: bool
) -> None:
    found = ScoredStep(rollouts=[], rewards={})
    monkeypatch.setattr(Collector, "_finished", lambda *_: found if on_file else None)
    monkeypatch.setattr(Collector, "_draw", lambda *_: found)
    monkeypatch.setattr(collect, "raised_on_all_ranks", nullcontext)
    monkeypatch.setattr(collect, "write_step", Mock())
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    prompts, generator = Mock(), Mock()
    prompts.stream.state_dict.return_value = {}
    collector = Collector(
        config=RlConfig(), prompts=prompts, generator=generator, rewards=Mock(), folder=Path("rollouts")
    )
    assert collector.collect(3, "2-abc", PhaseTimes()) is found
    assert generator.forget.call_count == (0 if on_file else 1)


def test_a_step_is_taken_from_file_if_the_same_weights_made_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn = [ScoredStep(rollouts=[rollout(0, (7, token))], rewards={"one": np.array([1.0])}) for token in (8, 9)]
    waiting = iter(drawn)
    monkeypatch.setattr(Collector, "_draw", lambda *_: next(waiting))
    monkeypatch.setattr(collect, "raised_on_all_ranks", nullcontext)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda *_, **__: None)
    prompts = Mock(rows={"a": rollout(0).row})
    prompts.stream.state_dict.return_value = {"drawn": [4]}
    collector = Collector(config=RlConfig(), prompts=prompts, generator=Mock(), rewards=Mock(), folder=tmp_path)
    for weights, place in (("2-abc", 0), ("2-abc", 0), ("2-abd", 1)):
        assert collector.collect(3, weights, PhaseTimes()).rollouts == drawn[place].rollouts
    there = read_header(step_file(tmp_path, 3))
    assert there["rollouts"] == 1 and there["settings"]["rollout.max_new_tokens"] == 256
    prompts.stream.load_state_dict.assert_called_once_with({"drawn": [4]})


class Answers:
    """A generator whose answers say the name of their row, how often prompts were drawn, and which it is.

    Those to a prompt named by a capital letter are cut off, but for the first, which is half as long; those to Z too.
    """

    draws = 0

    def answer_alone(self, prompts: Sequence[PolicyPrompt], settings: AnswerSettings) -> list[Rollout]:
        self.draws += 1
        return [
            self._answer(each.row.id, group, place, settings.max_new_tokens)
            for group, each in enumerate(prompts)
            for place in range(settings.samples)
        ]

    def _answer(self, name: str, group: int, place: int, longest: int) -> Rollout:
        cut_off = name.isupper() and (place > 0 or name == "Z")
        tokens = longest if cut_off else longest // 2
        return replace(rollout(group, range(tokens), name=name), text=f"{name}{self.draws}{place}", cut_off=cut_off)


class InOrder:
    """Prompts named by letters."""

    def __init__(self, names: str) -> None:
        self.waiting = [prompt(name) for name in names]

    def draw(self, count: int) -> list[PolicyPrompt]:
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        return taken


def drawn(judge: Callable[[str], Outcome], *settings: str, names: str = "abcdef") -> ScoredStep:
    """Return a step of two prompts with two answers each, replaced where they are worth the same."""
    sizes = ["train.global_batch_size=2", "rollout.samples=2", "rollout.dynamic_sampling=true"]
    config = load_job("rl/quickstart", ["model.load=x", *sizes, *settings])
    assert isinstance(config, RlConfig)
    rewards = Rewards({"one": lambda rollouts: iter([[judge(each.text) for each in rollouts]])}, [])
    prompts: Any = Mock(stream=InOrder(names))
    generator: Any = Answers()
    collector = Collector(
        config=config, prompts=prompts, generator=generator, rewards=JobRewards(rewards, 20), folder=Path()
    )
    return collector._draw(1, prompts.stream, "0-a", PhaseTimes(), alone=True)


def test_failures_of_a_step_are_judged_over_all_its_draws(caplog: pytest.LogCaptureFixture) -> None:
    failed = RewardFailure(Fault.raised, "ValueError: no good")

    def judge(text: str) -> Outcome:
        return {"a10": 0.0, "a11": 1.0, "b10": 0.5, "b11": 0.5}.get(text, failed)

    found = drawn(judge)
    assert [each.row.id for each in found.rollouts] == ["a", "a", "b", "b"] and found.draws == 3
    assert found.faults == {"one/raised": 4} and found.generated == 8
    (line,) = (record.getMessage() for record in caplog.records)
    assert line == "The reward one failed for 4 of 8 rollouts (4 raised; ValueError: no good)."
    with pytest.raises(DataError, match=r"failed for 12 of 12 rollouts .* has a value for none"):
        drawn(lambda _: failed)


@pytest.mark.parametrize(
    ("settings", "judge", "used"),
    [
        # Answers worth the same differ in length; those worth 1 more if they are cut off no more, and b is replaced.
        (["rollout.overlong=shape", "rollout.overlong_buffer=4"], lambda text: 1.0, "AC"),
        (["rollout.overlong=shape", "rollout.overlong_buffer=4"], lambda text: float(text[2]), "bd"),
        (["rollout.overlong=mask"], lambda text: float(text[2]), "Ab"),
        ([], lambda text: float(text[2]), "Ab"),
    ],
    ids=["only shaped", "shaped away", "masked in part", "kept"],
)
def test_dynamic_sampling_sees_what_the_update_sees(
    settings: list[str], judge: Callable[[str], Outcome], used: str
) -> None:
    found = drawn(judge, "rollout.max_new_tokens=8", *settings, names="AbCdEfGh")
    assert [each.row.id for each in found.rollouts[::2]] == list(used)
    values = [judge(f"{each.row.id}1{place % 2}") for place, each in enumerate(found.rollouts)]
    assert found.rewards["one"].tolist() == values, "as they were computed"


def test_groups_of_masked_answers_alone_are_replaced() -> None:
    for overlong, used in (("mask", "AB"), ("keep", "AZ")):
        found = drawn(lambda text: float(text[2]), f"rollout.overlong={overlong}", names="AZBC")
        assert [each.row.id for each in found.rollouts[::2]] == list(used)
