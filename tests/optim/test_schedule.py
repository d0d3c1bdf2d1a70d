"""Learning rates worked out by hand."""

import pytest

from megatron_ads.config.training import OptimConfig, Schedule
from megatron_ads.optim.adam import LearningRateSchedule


def _schedule(shape: Schedule) -> LearningRateSchedule:
    settings = OptimConfig(learning_rate=1.0, min_learning_rate=0.2, warmup_steps=3, schedule=shape)
    return LearningRateSchedule(settings, total_steps=8)


@pytest.mark.parametrize("shape", list(Schedule))
def test_warm_up_rises_in_equal_steps_and_reaches_the_peak(shape):
    # 3 warm-up updates of 1/4 each, then the peak at update 3
    assert [_schedule(shape).at(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_linear_decay_reaches_the_floor_at_the_last_step():
    # steps 3 to 7: four equal steps of (1.0 - 0.2) / 4 = 0.2 down
    assert [_schedule(Schedule.linear).at(step) for step in range(3, 8)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine_decay_is_halfway_in_the_middle():
    # step 5 is halfway from 3 to 7: 0.2 + 0.8 * (1 + cos(pi / 2)) / 2 = 0.6
    cosine = _schedule(Schedule.cosine)
    assert [cosine.at(3), cosine.at(5), cosine.at(7)] == pytest.approx([1.0, 0.6, 0.2])


def test_constant_stays_at_the_peak():
    assert _schedule(Schedule.constant).at(100) == 1.0


def test_steps_behind_the_last_stay_at_the_floor():
    assert _schedule(Schedule.cosine).at(50) == pytest.approx(0.2)
