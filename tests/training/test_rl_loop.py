"""The loop of reinforcement learning: what it says of a step that cannot teach anything, and when it evaluates."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import numpy as np
import pytest
import torch.distributed as dist

from megatron_ads.config.recipes import load_job
from megatron_ads.config.rl import Overlong, RewardConfig, RewardsConfig, RlConfig, RolloutConfig
from megatron_ads.config.teacher import TeacherConfig
from megatron_ads.errors import DataError
from megatron_ads.losses.advantages import group_advantages
from megatron_ads.rewards.failures import RewardHistory
from megatron_ads.rewards.weights import RewardWeights
from megatron_ads.training import rl
from megatron_ads.training.policy_update import PolicyUpdate
from megatron_ads.training.rl import RlJob
from megatron_ads.training.rollout.dump import ScoredStep, step_file, step_settings, write_step
from megatron_ads.training.rollout.metrics import of_step
from tests.training.rollout.test_rollouts import rollout

SAME, UNJUDGED = (
    "the answers to each of its 8 prompts are all worth the same",
    "no reward in rewards.use judges answers",
)


def looped(teacher: str | None, rollout: RolloutConfig, *, trains: bool = True) -> Any:
    """Return a job after its fourth step."""
    config = SimpleNamespace(
        train=SimpleNamespace(global_batch_size=8), teacher=TeacherConfig(model=teacher), rollout=rollout
    )
    return SimpleNamespace(config=config, session=SimpleNamespace(step=4), update=object() if trains else None)


@pytest.mark.parametrize(
    ("flat", "trains", "teacher", "mean", "said"),
    [
        (8, True, None, {"critic/rewards/mean": 0.0}, f"step 5 teaches nothing: {SAME}"),
        (8, True, None, {}, f"step 5 teaches nothing: {UNJUDGED} to its prompts, of task chat, query_ad_relevance. Na"),
        (7, True, None, {"critic/rewards/mean": 0.0}, ""),
        (8, False, None, {}, ""),
        (8, True, "m", {"critic/rewards/mean": 0.0}, ""),
    ],
)
def test_a_step_whose_answers_are_all_worth_the_same_is_named(
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    flat: int,
    trains: bool,
    teacher: str | None,
    mean: dict[str, float],
    said: str,
) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    config = SimpleNamespace(
        train=SimpleNamespace(global_batch_size=8), teacher=TeacherConfig(model=teacher), rollout=RolloutConfig()
    )
    job: Any = SimpleNamespace(config=config, session=SimpleNamespace(step=4), update=object() if trains else None)
    rollouts: Any = [SimpleNamespace(row=SimpleNamespace(task=task)) for task in ("query_ad_relevance", "chat")]
    found = ScoredStep(rollouts=rollouts, rewards={})
    RlJob.warn_of_nothing_to_learn(cast(RlJob, job), found, mean | {"rollout/groups_without_variance": float(flat)})
    assert said in caplog.text and bool(said) is bool(caplog.text)


def test_a_step_whose_answers_are_all_masked_is_named(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    found = ScoredStep(rollouts=[replace(rollout(group), cut_off=True) for group in range(8)], rewards={})
    metrics = {"critic/rewards/mean": 0.5, "rollout/groups_without_variance": 8.0}
    RlJob.warn_of_nothing_to_learn(looped(None, RolloutConfig(overlong=Overlong.mask)), found, metrics)
    assert "step 5 teaches nothing: all its answers were cut off, and rollout.overlong is mask" in caplog.text


def test_all_of_a_step_sees_the_same_shaped_rewards_and_the_update_those_it_always_had() -> None:
    # The buffer is 4 of 8 tokens: lengths 4, 6, 8 and 5 cost 0, 1/2, 1 and 1/4.
    config = load_job(
        "rl/quickstart",
        ["model.load=x", "rollout.max_new_tokens=8", "rollout.overlong=shape", "rollout.overlong_buffer=4"],
    )
    assert isinstance(config, RlConfig)
    rollouts = [rollout(group, range(length)) for group, length in ((0, 4), (0, 6), (1, 8), (1, 5))]
    raw = np.array([1.0, 1.0, 0.1, np.nan])
    answering: Any = Mock(**{"collect.return_value": ScoredStep(rollouts=rollouts, rewards={"one": raw})})
    job: Any = object.__new__(RlJob)
    for name, value in {"config": config, "answering": answering, "times": None}.items():
        object.__setattr__(job, name, value)
    found = job.rollouts_of(5)
    np.testing.assert_array_equal(found.rewards["one"], [1.0, 0.5, 0.1 - 1, np.nan])
    metrics = of_step(found, {"one": 1.0}, config.rollout)
    assert metrics["critic/rewards/max"] == 1.0 and metrics["critic/rewards/min"] == 0.1 - 1
    assert metrics["rollout/groups_without_variance"] == 1.0, "not of group 0, whose rewards are equal without it"
    update = PolicyUpdate(config=config, session=Mock(), share=Mock(), reference=None)
    advantages = update._advantages(found, update._with_kl(found, [], None), {"one": 1.0})
    penalty = np.array([0, 0.5, 1, 0.25])
    before = group_advantages(raw - penalty, np.array([0, 0, 1, 1]), config.policy).astype(np.float32)
    assert [values[0] for values in advantages] == before.tolist() and before[0] > 0


def test_a_checkpoint_keeps_which_rewards_have_had_values() -> None:
    def position() -> rl.Position:
        weights = RewardWeights(RewardsConfig(use=[RewardConfig(name="one")]))
        return rl.Position(Mock(**{"state_dict.return_value": {}}), weights, ["3-abc"], RewardHistory())

    before, after, older = position(), position(), position()
    before.reward_history.observe({"one": np.array([0.5, np.nan]), "two": np.array([np.nan, np.nan])})
    after.load_state_dict(before.state_dict())
    assert after.reward_history.state_dict() == ["one"]
    older.load_state_dict({name: value for name, value in before.state_dict().items() if name != "reward_history"})
    assert older.reward_history.state_dict() == []


@pytest.mark.parametrize(("held_out", "times"), [(["prompt"], 2), ([], 0)])
def test_a_job_is_evaluated_when_it_is_due_if_it_has_held_out_prompts(
    monkeypatch: pytest.MonkeyPatch, held_out: list[str], times: int
) -> None:
    config = load_job("rl/quickstart", ["model.load=x", "train.max_steps=5", "train.evaluate_every=2"])
    session: Any = Mock(
        config=config, step=0, is_finished=False, is_due=lambda every: every and session.step % every == 0
    )
    evaluate = Mock()

    def step(job: object) -> bool:
        session.step += 1
        session.is_finished = session.step == 5
        return False

    monkeypatch.setattr(rl, "_step", step)
    monkeypatch.setattr(rl, "_evaluate", evaluate)
    assert not rl.train(Mock(config=config, session=session, prompts=Mock(held_out=held_out)))
    assert evaluate.call_count == times


@pytest.mark.parametrize("setting", ["train.global_batch_size=8", "rollout.samples=4", "rollout.max_new_tokens=32"])
def test_a_job_trains_only_on_rollouts_that_were_made_with_its_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: str
) -> None:
    words = ["model.load=x", "rollout.mode=train_only", f"rollout.dump={tmp_path}", "train.global_batch_size=4"]
    words += ["rollout.samples=2", "rollout.max_new_tokens=16"]
    config: Any = load_job("rl/quickstart", words)
    answers = [rollout(group) for group in range(4) for _ in range(2)]
    found = ScoredStep(rollouts=answers, rewards={"label_agreement": np.arange(8.0)})
    write_step(step_file(tmp_path, 1), found, {"settings": step_settings(config)})
    monkeypatch.setattr(rl, "raised_on_all_ranks", nullcontext)

    def taken(config: Any) -> ScoredStep:
        prompts: Any = Mock(rows={"a": answers[0].row})
        job = RlJob(
            config=config, session=Mock(), prompts=prompts, reward_weights=Mock(), reward_history=Mock(),
            answering=None, update=Mock(),
        )  # fmt: skip
        return job.rollouts_of(1)

    assert taken(config).rollouts == answers
    with pytest.raises(DataError, match=rf"was made with {setting.partition('=')[0]} = \d+, and this job has "):
        taken(load_job("rl/quickstart", [*words, setting]))
