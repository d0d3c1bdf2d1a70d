"""A step's rollouts are drawn once: what is kept of them, and until when."""

from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch.distributed as dist

from megatron_ads.config.rl import RlConfig
from megatron_ads.training.rollout import collect
from megatron_ads.training.rollout.collect import Collector
from megatron_ads.training.rollout.dump import ScoredStep, read_header, step_file
from megatron_ads.training.rollout.metrics import PhaseTimes
from tests.training.rollout.test_rollouts import rollout


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
