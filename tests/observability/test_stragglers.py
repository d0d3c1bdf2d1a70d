"""Which rank is named as slow, when, and how often."""

import logging
from collections.abc import Sequence

import pytest

from megatron_ads.observability.stragglers import RankComparison, StragglerWatch

STAGES = (0, 0, 0, 1, 1, 1)
HOSTS = ("a", "a", "b", "b", "c", "c")
EVEN = (1.0, 1.1, 0.9, 5.0, 5.2, 4.9)
"""Stage 1 has more to do; that makes nobody slow."""


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    logger = logging.getLogger("megatron_ads.observability.stragglers")
    monkeypatch.setattr(logger, "handle", lambda record: said.append(record.getMessage()))
    logger.setLevel(logging.INFO)
    return said


def _with(rank: int, seconds: float) -> Sequence[float]:
    return [seconds if each == rank else own for each, own in enumerate(EVEN)]


def _observe(
    steps: Sequence[Sequence[float]], *, step_seconds: float = 10.0, stages: Sequence[int] = STAGES
) -> RankComparison | None:
    watch = StragglerWatch(stages, HOSTS, factor=1.5, steps=3)
    found = None
    for step, seconds in enumerate(steps, start=1):
        found = watch.observe(step, seconds, step_seconds)
    return found


def test_a_slow_rank_is_named_once_with_stage_host_and_both_times(lines: list[str]) -> None:
    found = _observe([_with(4, 8.0)] * 7)
    # The others of stage 1 took 5.0 and 4.9.
    assert found is not None and (found.rank, found.median_seconds) == (4, 4.95)
    assert len(lines) == 1
    assert lines[0].startswith(
        "rank 4 (stage 1) on c holds up the job: its own work took 8 s of the 10 s of step 3, 1.6 times the median of "
        "the others of its stage, 4.95 s, in 3 consecutive logged steps."
    )


def test_even_ranks_cause_no_word_but_are_compared(lines: list[str]) -> None:
    found = _observe([EVEN] * 9)
    assert found is not None and found.rank == 4  # 5.2 against the median of 5.0 and 4.9
    assert found.over_median == pytest.approx(5.2 / 4.95)
    assert lines == []


def test_now_and_then_is_not_on_end(lines: list[str]) -> None:
    slow = _with(4, 8.0)
    _observe([slow, slow, EVEN] * 4)
    assert lines == []


def test_a_new_episode_is_told_and_so_is_its_end(lines: list[str]) -> None:
    slow = _with(0, 3.0)
    _observe([slow] * 4 + [EVEN, slow, EVEN] + [EVEN] * 3 + [slow] * 3)  # one good step does not end an episode
    assert [line.split(":")[0] for line in lines] == [
        "rank 0 (stage 0) on a holds up the job",
        "rank 0 has kept up with its stage for 3 logged steps",
        "rank 0 (stage 0) on a holds up the job",
    ]


def test_two_slow_ranks_are_both_named(lines: list[str]) -> None:
    seconds = list(EVEN)
    seconds[0], seconds[5] = 3.0, 9.0
    _observe([seconds] * 3)
    assert [line[:6] for line in lines] == ["rank 0", "rank 5"]


def test_a_difference_that_costs_the_step_next_to_nothing_is_no_reason(lines: list[str]) -> None:
    _observe([_with(0, 3.0)] * 5, step_seconds=100.0)  # 2 s of 100 are below a tenth
    assert lines == []


def test_a_rank_without_others_in_its_stage_has_no_measure(lines: list[str]) -> None:
    assert _observe([_with(4, 80.0)] * 5, stages=range(6)) is None
    assert lines == []
