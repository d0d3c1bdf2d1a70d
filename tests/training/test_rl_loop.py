"""The loop of reinforcement learning: what it says of a step that cannot teach anything, and when it evaluates."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import numpy as np
import pytest
import torch.distributed as dist

from megatron_ads.config.recipes import load_job
from megatron_ads.config.rl import RewardConfig, RewardsConfig
from megatron_ads.config.teacher import TeacherConfig
from megatron_ads.errors import DataError
from megatron_ads.rewards.failures import RewardHistory
from megatron_ads.rewards.weights import RewardWeights
from megatron_ads.training import rl
from megatron_ads.training.rl import RlJob
from megatron_ads.training.rollout.dump import ScoredStep, step_file, step_settings, write_step
from tests.training.rollout.test_rollouts import rollout

SAME, UNJUDGED = (
    "the answers to each of its 8 prompts are all worth the same",
    "no reward in rewards.use judges answers",
)


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
    config = SimpleNamespace(train=SimpleNamespace(global_batch_size=8), teacher=TeacherConfig(model=teacher))
    job: Any = SimpleNamespace(config=config, session=SimpleNamespace(step=4), update=object() if trains else None)
    rollouts: Any = [SimpleNamespace(row=SimpleNamespace(task=task)) for task in ("query_ad_relevance", "chat")]
    found = ScoredStep(rollouts=rollouts, rewards={})
    RlJob.warn_of_nothing_to_learn(cast(RlJob, job), found, mean | {"rollout/groups_without_variance": float(flat)})
    assert said in caplog.text and bool(said) is bool(caplog.text)


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
            config=config, session=Mock(), prompts=prompts, reward_weights=Mock(), answering=None, update=Mock()
        )
        return job.rollouts_of(1)

    assert taken(config).rollouts == answers
    with pytest.raises(DataError, match=rf"was made with {setting.partition('=')[0]} = \d+, and this job has "):
        taken(load_job("rl/quickstart", [*words, setting]))
