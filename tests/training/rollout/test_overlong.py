"""Answers that are too long: what is taken off, and which groups then teach nothing."""

from dataclasses import replace

import numpy as np

from megatron_ads.config.rl import Overlong, RolloutConfig
from megatron_ads.rollouts import Rollout
from megatron_ads.training.rollout.overlong import groups_that_teach_nothing, overlong_penalty, shaped
from tests.training.rollout.test_rollouts import rollout

SHAPE = RolloutConfig(max_new_tokens=100, overlong=Overlong.shape, overlong_buffer=20)
MASK = RolloutConfig(max_new_tokens=100, overlong=Overlong.mask)


def answer(group: int, tokens: int) -> Rollout:
    return replace(rollout(group, range(tokens)), cut_off=tokens == 100)


def test_the_penalty_of_length_rises_over_the_buffer_to_1() -> None:
    assert [overlong_penalty(SHAPE, length) for length in (10, 80, 85, 100)] == [0, 0, 0.25, 1]
    assert overlong_penalty(RolloutConfig(max_new_tokens=100), 100) == 0


def test_the_penalty_is_taken_off_every_reward_that_there_is() -> None:
    rewards = {"one": np.array([1.0, np.nan]), "two": np.array([0.5, 0.5])}
    found = shaped(rewards, [answer(0, 85), answer(0, 100)], SHAPE)
    np.testing.assert_array_equal(found["one"], [0.75, np.nan])
    np.testing.assert_array_equal(found["two"], [0.25, -0.5])
    np.testing.assert_array_equal(shaped(rewards, [answer(0, 85), answer(0, 100)], MASK)["two"], [0.5, 0.5])


def test_masked_answers_count_in_their_group_unless_it_has_no_others() -> None:
    rollouts = [answer(group, tokens) for group, tokens in ((3, 100), (3, 100), (4, 10), (4, 100), (5, 10), (5, 10))]
    values = np.array([0.0, 1.0, 1.0, 0.0, 0.5, 0.5])
    assert groups_that_teach_nothing(values, rollouts, MASK) == [3, 5]
    assert groups_that_teach_nothing(values, rollouts, RolloutConfig()) == [5]
