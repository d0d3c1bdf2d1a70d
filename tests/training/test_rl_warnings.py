"""What a reinforcement learning job says of a step that cannot teach anything."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch.distributed as dist

from megatron_ads.training.rl import RlJob


@pytest.mark.parametrize(("flat", "trains", "said"), [(8, True, True), (7, True, False), (8, False, False)])
def test_a_step_whose_answers_are_all_worth_the_same_is_named(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, flat: int, trains: bool, said: bool
) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    train = SimpleNamespace(global_batch_size=8)
    job: Any = SimpleNamespace(
        config=SimpleNamespace(train=train), session=SimpleNamespace(step=4), update=object() if trains else None
    )
    metrics = {"rollout/groups_without_variance": float(flat), "critic/rewards/mean": 0.0}
    RlJob.warn_of_nothing_to_learn(cast(RlJob, job), metrics)
    assert ("step 5 teaches nothing: the answers to each of its 8 prompts" in caplog.text) is said
