"""Rollouts that are made while the trainer updates: in which order, by which weights, and how errors come out."""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ads.config.generation import EndpointConfig, GenerationConfig, Method
from megatron_ads.config.recipes import load_job
from megatron_ads.config.rl import RlConfig, RolloutConfig, RolloutMode
from megatron_ads.errors import DataError, MegatronAdsError
from megatron_ads.inference.server_pool import ServerPool
from megatron_ads.rewards.reward import RewardFailure
from megatron_ads.rollouts import Rollout
from megatron_ads.training.rollout.background import BackgroundRollouts, MadeStep
from megatron_ads.training.rollout.collect import Collector
from megatron_ads.training.rollout.dump import ScoredStep, read_header, step_file
from megatron_ads.training.rollout.prompts import Prompts, PromptStream
from megatron_ads.training.rollout.teacher import JobTeacher, Teacher
from parity_tests.harness.ranks import run_ranks
from tests.inference.scripted_server import Reply, scripted_server
from tests.training.rollout.test_rollouts import Fakes, prompt, rollout

SECONDS = 20.0
"""Longest wait for another thread."""


class Making:
    """Makes steps, each when it is let; the prompts of step s are behind ``{"drawn": s}``."""

    def __init__(self, *, free: bool = True, fails: int | None = None) -> None:
        self.calls = list[tuple[int, list[str], int]]()
        self.fails = fails
        self.began, self.may = (
            [threading.Event() for _ in range(9)],
            [threading.Event() for _ in range(9)],
        )
        for event in self.may if free else ():
            event.set()

    def __call__(self, step: int, weights: Sequence[str], prompts: Mapping[str, Any]) -> MadeStep:
        self.calls.append((step, list(weights), prompts["drawn"]))
        self.began[step].set()
        assert self.may[step].wait(SECONDS)
        if step == self.fails:
            raise DataError(f"step {step} is lost")
        found = ScoredStep(rollouts=[rollout(0, (step,))], rewards={"one": np.array([1.0])})
        return MadeStep(found=found, prompts={"drawn": step}, seconds={"rollout": 2.0})


@contextmanager
def thread_for(make: Making, *, max_staleness: int = 1, patience: float = SECONDS) -> Iterator[BackgroundRollouts]:
    background = BackgroundRollouts(
        make, max_staleness=max_staleness, last_step=4, longest_wait_seconds=patience, stop=lambda: None
    )
    try:
        yield background
    finally:
        for event in make.may:
            event.set()
        background.close()


def taken(background: BackgroundRollouts, step: int, max_staleness: int = 1) -> int:
    """Take a step as the trainer does: with the weights of as many steps as were trained before."""
    weights = [f"w{number}" for number in range(step)][-1 - max_staleness :]
    return background.take(step, weights, {"drawn": step - 1}).found.rollouts[0].answer_tokens[0]


def test_the_next_step_is_made_during_an_update_and_by_the_weights_before_it() -> None:
    making = Making(free=False)
    with thread_for(making) as background:
        making.may[1].set()
        assert taken(background, 1) == 1
        assert making.began[2].wait(SECONDS) and not making.began[3].is_set()  # the trainer updates meanwhile
        threading.Timer(0.1, making.may[2].set).start()
        background.rest(2)
        assert making.may[2].is_set()
        for event in making.may:
            event.set()
        for step in (2, 3, 4):
            assert taken(background, step) == step
            background.rest(step + 1)
    # Names of what rollouts on file may be by, then of the weights that the servers have: the last.
    wanted = [(1, ["w0"], 0), (2, ["w0"], 1), (3, ["w1"], 2), (4, ["w2"], 3)]
    assert making.calls == wanted


@pytest.mark.parametrize("max_staleness", [1, 2, 3])
def test_no_step_is_made_by_weights_further_behind_than_allowed(max_staleness: int) -> None:
    making = Making()
    with thread_for(making, max_staleness=max_staleness) as background:
        for step in range(1, 5):
            taken(background, step, max_staleness)
            background.rest(step + 1)
    assert [step for step, _, _ in making.calls] == [1, 2, 3, 4]
    for step, names, drawn in making.calls:
        versions = [int(name[1:]) for name in names]
        assert step - 1 - max_staleness <= versions[0] <= versions[-1] <= step - 1 and drawn == step - 1


def test_steps_that_are_not_begun_when_new_weights_come_are_made_by_these() -> None:
    making = Making(free=False)
    with thread_for(making, max_staleness=3) as background:
        making.may[1].set()
        taken(background, 1, 3)
        assert making.began[2].wait(SECONDS)
        threading.Timer(0.1, making.may[2].set).start()
        background.rest(2)
        assert not making.began[3].is_set()
        making.may[3].set()
        making.may[4].set()
        assert taken(background, 2, 3) == 2 and making.began[3].wait(SECONDS)
    assert making.calls[:2] == [(1, ["w0"], 0), (2, ["w0"], 1)]
    assert making.calls[2] == (3, ["w0", "w1"], 2)


def test_an_error_is_raised_where_its_step_is_taken_and_a_wait_has_an_end() -> None:
    making = Making(fails=2)
    with thread_for(making, max_staleness=2) as background:
        taken(background, 1, 2)
        background.rest(2)
        with pytest.raises(DataError, match="step 2 is lost"):
            taken(background, 2, 2)
    assert [step for step, _, _ in making.calls] == [1, 2], "step 3 has no prompts to begin with"
    for wait in (lambda each: taken(each, 1), lambda each: each.rest(1)):
        with thread_for(Making(free=False), patience=0.05) as background:
            background._steps[1] = background._thread.submit(background._make, 1, [], {"drawn": 0})
            with pytest.raises(DataError, match=r"did not finish the rollouts of a step in 0\.05 s"):
                wait(background)


def test_the_end_of_a_job_does_not_wait_for_answers_that_were_not_asked_for(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("megatron_ads.inference.server_pool.OpenAIEngine._require_reported", lambda *_: None)
    config = GenerationConfig(method=Method.sampled, samples=40, max_new_tokens=4)
    with scripted_server(lambda *_: Reply(content="said", delay_seconds=0.3)) as server:
        of_server = EndpointConfig(url=server.url, model="m", concurrency=2)
        pool = ServerPool(RolloutConfig(mode=RolloutMode.servers, servers=[of_server]), None, tmp_path)  # type: ignore[arg-type]

        def make(*_: object) -> MadeStep:
            pool.generate([[5]], config)
            raise AssertionError("it was stopped")

        background = BackgroundRollouts(make, max_staleness=1, last_step=4, longest_wait_seconds=0.2, stop=pool.stop)
        with pytest.raises(DataError, match="did not finish"):
            background.take(1, ["w0"], {})
        future = background._thread.submit(lambda: None)
        background.close()
        assert future.cancelled() and 2 <= len(server.bodies) <= 4
        with pytest.raises(DataError, match="the run was stopped"):
            pool.generate([[6]], config)
        pool.close()


class Stream(PromptStream):
    """Six prompts, three of which teach something."""

    def __init__(self) -> None:
        super().__init__([[prompt(name) for name in "AbCdEf"]], ["here"], [1.0], 3)


class Alone(Fakes):
    """Fakes that rank 0 uses without the others."""

    def __init__(self) -> None:
        super().__init__()
        self.answer_alone, self.score_alone = self.answer, self.score
        self.forgotten = 0

    def forget(self) -> None:
        self.forgotten += 1


def collector_in(folder: Path, fakes: Alone) -> Collector:
    settings = ["train.global_batch_size=2", "rollout.dynamic_sampling=true", "rollout.samples=2"]
    config = load_job("rl/quickstart", ["model.load=x", *settings])
    assert isinstance(config, RlConfig)
    rows = {each.row.id: each.row for each in map(prompt, "AbCdEf")}
    prompts = Prompts(stream=Stream(), held_out=[], probe=[], rows=rows)
    return Collector(config=config, prompts=prompts, generator=fakes, rewards=fakes, folder=folder)  # type: ignore[arg-type]


def test_a_step_is_drawn_in_the_same_order_as_on_all_ranks_and_the_job_s_position_stays(tmp_path: Path) -> None:
    fakes, of_all = Alone(), Alone()
    collector, together = collector_in(tmp_path, fakes), Stream()
    position = collector.prompts.stream.state_dict()
    made = list[MadeStep]()
    for step in (1, 2, 3):
        made.append(collector.make(step, [f"w{step}"], made[-1].prompts if made else position))
        drawn = collector_in(tmp_path, of_all)._draw(step, together, f"w{step}", _times())
        assert made[-1].found.rollouts == drawn.rollouts and made[-1].prompts == together.state_dict()
        assert made[-1].seconds.keys() == {"rollout", "reward"}
    assert fakes.asked == of_all.asked and len(fakes.asked) > 3, "some prompts were replaced"
    assert collector.prompts.stream.state_dict() == position and fakes.forgotten == 3


def test_a_step_on_file_is_taken_if_any_of_the_latest_weights_made_it(tmp_path: Path) -> None:
    fakes = Alone()
    collector = collector_in(tmp_path, fakes)
    position = collector.prompts.stream.state_dict()
    first = collector.make(1, ["w0", "w1"], position)
    assert read_header(step_file(tmp_path, 1))["weights"] == "w1"
    asked = len(fakes.asked)
    again = collector.make(1, ["w1", "w2", "w3"], position)
    assert (again.found.rollouts, again.prompts) == (first.found.rollouts, first.prompts)
    assert json.dumps(again.prompts, sort_keys=True) == json.dumps(first.prompts, sort_keys=True)
    assert len(fakes.asked) == asked and fakes.forgotten == 1
    collector.make(1, ["w2", "w3"], position)
    assert len(fakes.asked) > asked and read_header(step_file(tmp_path, 1))["weights"] == "w3"


def test_rank_0_asks_the_teacher_of_a_step_s_answers_alone_and_another_teacher_s_step_is_not_taken(
    tmp_path: Path,
) -> None:
    asked = list[int]()

    def read(rollouts: Sequence[Rollout]) -> list[Sequence[float] | RewardFailure]:
        asked.append(len(rollouts))
        return [[-0.5] * len(each.answer_tokens) for each in rollouts]

    fakes = Alone()
    collector = replace(collector_in(tmp_path, fakes), teacher=JobTeacher(Teacher(read=read), 20))
    collector.config.teacher.model = "one"
    position = collector.prompts.stream.state_dict()
    made = collector.make(1, ["w0"], position)
    assert [each.teacher_log_probabilities for each in made.found.rollouts] == [(-0.5, -0.5)] * 4
    assert asked == [4] and made.found.generated > 4, "not of those that were replaced"
    assert made.seconds.keys() == {"rollout", "reward", "teacher"}
    assert collector.make(1, ["w0"], position).found.rollouts == made.found.rollouts and asked == [4]
    collector.config.teacher.model = "other"
    collector.make(1, ["w0"], position)
    assert asked == [4, 4]


def _times() -> Any:
    from megatron_ads.training.rollout.metrics import PhaseTimes

    return PhaseTimes()


def _trained() -> tuple[list[int], dict[str, float], dict[str, Any], dict[str, float], list[str], str]:
    """Train three steps on rollouts of rank 0, of which the fourth fail; return what this rank saw."""
    import torch.distributed as dist

    from megatron_ads.training.rollout.answering import Answering

    making, times, fakes = Making(fails=4), _times(), Alone()
    config: Any = load_job("rl/quickstart", ["model.load=x"])
    config.rollout.max_staleness = 1

    class Position:
        state: Mapping[str, Any] = {"drawn": 0}

        def state_dict(self) -> Mapping[str, Any]:
            return self.state

        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            self.state = state

    class Named:
        """Weights with a name for each update, and an engine and a probe that know it."""

        updates = 0
        max_logprob_diff = None

        def follow(self, _: object) -> None:
            self.updates += 1

        def mark(self, *_: object) -> tuple[str, float]:
            return f"w{self.updates - 1}", 0.0

        def name_weights(self, _: str) -> None:
            pass

        def metrics(self) -> dict[str, float]:
            return {}

        gap = model = None

    named, position, seen = Named(), Position(), list[int]()
    prompts = Prompts(stream=position, held_out=[], probe=[], rows={})  # type: ignore[arg-type]
    collector = Collector(config=config, prompts=prompts, generator=fakes, rewards=fakes, folder=Path())  # type: ignore[arg-type]
    with thread_for(making) as background:
        own = background if dist.get_rank() == 0 else None
        answering = Answering(named, named, named, collector, [], own)  # type: ignore[arg-type]
        answering.follow()
        for step in (1, 2, 3):
            found = answering.collect(step, times)
            seen.append(found.rollouts[0].answer_tokens[0])
            found.rollouts[0] = rollout(0)
            answering.rest(step + 1, times)
            answering.follow()
        object.__setattr__(found.rollouts[0], "weights", "w2")
        staleness = answering.staleness(found)
        with pytest.raises(MegatronAdsError) as caught:
            answering.collect(4, times)
    return seen, staleness, dict(position.state), times.seconds, answering.weights, str(caught.value)


def test_all_ranks_get_what_rank_0_made_and_its_error() -> None:
    for seen, staleness, position, seconds, weights, said in run_ranks(2, _trained):
        assert seen == [1, 2, 3] and position == {"drawn": 3} and weights == ["w2", "w3"]
        assert staleness == {"rollout/staleness/mean": 1, "rollout/staleness/max": 1}
        assert seconds["rollout"] == 6 and seconds["wait"] > 0
        assert said == "step 4 is lost"
